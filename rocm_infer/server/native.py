# SPDX-License-Identifier: Apache-2.0
"""SGLang's native routes: /generate (single or list, cumulative streaming), /flush_cache, /abort_request."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from rocm_infer.config import SamplingParams
from rocm_infer.engine.messages import TokenLogprob
from rocm_infer.server.body import SERVICE, call_of, json_response, read_body, read_fields
from rocm_infer.server.call import Call
from rocm_infer.server.errors import ApiError, bad_value, unavailable
from rocm_infer.server.generation import Generation
from rocm_infer.server.logprobs import native_logprobs, native_top_logprobs
from rocm_infer.server.openai import STREAMS
from rocm_infer.server.schema import AbortBody, NativeRequest, NativeSampling, native_params, parse
from rocm_infer.server.service import Service
from rocm_infer.server.sse import EventStream, event
from rocm_infer.server.structured import plain_grammar, teach_vocabulary
from rocm_infer.text.outputs import Output

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Ask:
    """One prompt of a /generate request with its own settings."""

    ids: list[int]
    rid: str
    params: SamplingParams
    return_logprob: bool
    logprob_start: int
    with_text: bool


async def generate(request: web.Request) -> web.StreamResponse:
    service, call = request.app[SERVICE], call_of(request)
    service.admit()
    body = await read_body(request, NativeRequest)
    asks, single = await _asks(service, call, body)
    count = asks[0].params.n
    if any(ask.params.n != count for ask in asks):
        raise bad_value("sampling_params.n", "sampling_params.n: expected the same n for every prompt of a request")
    prompts, params = [ask.ids for ask in asks], [ask.params for ask in asks]
    await teach_vocabulary(service, [each.grammar for each in params])
    generation = service.generate(call, prompts, params, count, priority=body.priority)
    try:
        for ask in asks:
            generation.name(ask.rid)
        if body.stream:
            alone = single and count == 1
            events = _events(service, call, generation, asks, count, alone)
            return await EventStream(request, request.app[STREAMS]).run(events, call)
        await generation.finish()
        shown = [_shown(service, call, asks[i // count], output) for i, output in enumerate(generation.outputs)]
        return json_response(shown[0] if single and count == 1 else shown)
    finally:
        generation.close()


async def _asks(service: Service, call: Call, body: NativeRequest) -> tuple[list[Ask], bool]:
    """The prompts of a request, and whether it was a single one (then the answer is no list)."""
    prompts, single = await _prompts(service, body)
    size = len(prompts)
    settings = _spread(body.sampling_params, size, "sampling_params")
    with_logprobs = _spread(body.return_logprob, size, "return_logprob")
    starts = _spread(body.logprob_start_len, size, "logprob_start_len")
    tops = _spread(body.top_logprobs_num, size, "top_logprobs_num")
    rids = body.rid if isinstance(body.rid, list) else None
    if rids is not None and len(rids) != size:
        raise bad_value("rid", f"rid: expected {size} ids, got {len(rids)}")
    asks = []
    for index, ids in enumerate(prompts):
        sampling, unknown = parse(NativeSampling, settings[index], where="sampling_params.")
        service.note_unknown(unknown, "sampling_params.")
        if not with_logprobs[index]:
            top = prompt_top = None
        else:
            top, prompt_top = tops[index], tops[index] if starts[index] >= 0 else None
        params = native_params(
            sampling,
            defaults=service.files.defaults,
            vocab_size=service.vocab_size,
            logprobs=top,
            prompt_logprobs=prompt_top,
        )
        params = dataclasses.replace(params, grammar=plain_grammar(sampling, prefix="sampling_params."))
        service.check_length(len(ids), params.max_tokens, "sampling_params.max_new_tokens")
        rid = rids[index] if rids else body.rid if isinstance(body.rid, str) else f"{call.id}-{index}"
        asks.append(Ask(ids, rid, params, with_logprobs[index], starts[index], body.return_text_in_logprobs))
    return asks, single


async def _prompts(service: Service, body: NativeRequest) -> tuple[list[list[int]], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise bad_value("text", "expected exactly one of text and input_ids")
    if body.text is not None:
        single = isinstance(body.text, str)
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts = [await service.encode(text, add_special_tokens=True) for text in texts]
    else:
        prompts, single = _split_ids(body.input_ids or [])
    if not prompts:
        raise bad_value("text" if body.text is not None else "input_ids", "expected at least one prompt")
    for ids in prompts:
        service.check_ids(ids, "text" if body.text is not None else "input_ids")
    return prompts, single


def _split_ids(given: list[Any]) -> tuple[list[list[int]], bool]:
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given], True
    if kinds != {list}:
        raise bad_value("input_ids", "input_ids: expected token ids, or a non-empty list of lists of token ids")
    return given, False


def _spread(value: Any, size: int, field: str) -> list[Any]:
    """One value per prompt: given for all, or as a list."""
    if not isinstance(value, list):
        return [value] * size
    if len(value) != size:
        raise bad_value(field, f"{field}: expected one value or {size}, got {len(value)}")
    return value


def _shown(service: Service, call: Call, ask: Ask, output: Output) -> dict[str, Any]:
    """What /generate says of one output so far."""
    return {"text": output.text, "output_ids": output.token_ids, "meta_info": _meta(service, call, ask, output)}


def _meta(service: Service, call: Call, ask: Ask, output: Output) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": ask.rid,
        "finish_reason": _finish_reason(output),
        "prompt_tokens": len(ask.ids),
        "completion_tokens": len(output.token_ids),
        "cached_tokens": output.num_cached,
        "weight_version": "default",
    }
    if output.done:
        meta["e2e_latency"] = time.perf_counter() - call.started
    if ask.return_logprob:
        meta |= _logprobs(service, ask, output)
    return meta


def _finish_reason(output: Output) -> dict[str, Any] | None:
    if output.finish_reason is None:
        return None
    reason: dict[str, Any] = {"type": output.finish_reason}
    if output.finish_reason == "length":
        reason["length"] = len(output.token_ids)
    if output.matched_stop is not None:
        reason["matched"] = output.matched_stop
    return reason


def _logprobs(service: Service, ask: Ask, output: Output) -> dict[str, Any]:
    tokenizer, with_text = service.tokenizer, ask.with_text
    start = max(ask.logprob_start, 0)
    prompt: Sequence[TokenLogprob | None] = (output.prompt_logprobs or [])[start:]
    prompt_ids = ask.ids[start : start + len(prompt)]
    shown: dict[str, Any] = {
        "input_token_logprobs": native_logprobs(tokenizer, prompt, prompt_ids, with_text),
        "output_token_logprobs": native_logprobs(tokenizer, output.logprobs, output.token_ids, with_text),
    }
    if ask.params.logprobs:
        shown["input_top_logprobs"] = native_top_logprobs(tokenizer, prompt, with_text)
        shown["output_top_logprobs"] = native_top_logprobs(tokenizer, output.logprobs, with_text)
    return shown


async def _events(
    service: Service, call: Call, generation: Generation, asks: list[Ask], count: int, alone: bool
) -> AsyncIterator[bytes]:
    """One event per step with all text so far; `index` tells the outputs of a list apart."""
    async for index, text in generation:
        output = generation.outputs[index]
        if text or output.done:
            shown = _shown(service, call, asks[index // count], output)
            yield event(encode(shown if alone else {**shown, "index": index}))


async def flush_cache(request: web.Request) -> web.Response:
    """200 and plain text as SGLang answers; 400 while requests run."""
    service = request.app[SERVICE]
    service.admit()
    if service.client.num_requests:
        raise ApiError(f"Cache not flushed: {service.client.num_requests} requests are running; try again when idle")
    try:
        await service.client.flush()
    except RuntimeError as error:
        raise unavailable("unhealthy", f"Cache not flushed: {error}") from error
    return web.Response(text="Cache flushed.\n")


async def abort_request(request: web.Request) -> web.Response:
    """Aborts by request id (rid, response id or x-request-id), or everything. An unknown id aborts nothing."""
    service = request.app[SERVICE]
    body, unknown = parse(AbortBody, await read_fields(request))
    service.note_unknown(unknown)
    if body.abort_all:
        aborted = service.client.num_requests
        service.client.abort_all()
    elif body.rid:
        aborted = service.abort(body.rid)
    else:
        raise bad_value("rid", "rid: expected a request id, or abort_all: true")
    return json_response({"aborted": aborted})
