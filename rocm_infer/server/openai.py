# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions and /v1/completions: request to generation, generation to response or chunks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from aiohttp import web

from rocm_infer.config import SamplingParams
from rocm_infer.server.body import SERVICE, call_of, json_response, read_body
from rocm_infer.server.errors import bad_value
from rocm_infer.server.generation import Generation
from rocm_infer.server.logprobs import prompt_logprobs
from rocm_infer.server.schema import ChatRequest, CompletionRequest, OpenAIRequest, Prompt, params_of
from rocm_infer.server.service import Service
from rocm_infer.server.sse import EventStream, OpenStreams, event
from rocm_infer.server.structured import Tools, chat_grammar, plain_grammar, teach_vocabulary, tools_of
from rocm_infer.server.views import ChatView, CompletionView, Echo, Thinking, View
from rocm_infer.text.chat import check_messages
from rocm_infer.text.outputs import Output
from rocm_infer.text.reasoning import CLOSING, OPENING, begins_inside

STREAMS: web.AppKey[OpenStreams] = web.AppKey("streams", OpenStreams)
encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True)
class Answer:
    """Everything a response says beside its choices."""

    id: str
    created: int
    model: str
    fingerprint: str
    prompt_ids: list[list[int]]
    count: int

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def usage(self, outputs: Sequence[Output], view: View) -> dict[str, Any]:
        """A prompt counts once, however many outputs it has."""
        num_prompt = sum(map(len, self.prompt_ids))
        num_output = sum(len(output.token_ids) for output in outputs)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached for output in outputs[:: self.count])},
            "completion_tokens_details": {"reasoning_tokens": sum(map(view.num_thinking, outputs))},
        }


async def chat_completions(request: web.Request) -> web.StreamResponse:
    request.app[SERVICE].admit()
    body = await read_body(request, ChatRequest)
    return await _respond(request, body, *await start_chat(request, body))


async def start_chat(request: web.Request, body: ChatRequest) -> tuple[Generation, Answer, ChatView, dict[str, Any]]:
    """Starts the outputs of a chat request: the generation (the caller closes it), what the answer says beside its choices, how
    its choices are shown, and further fields of the (first) body."""
    service, call = request.app[SERVICE], call_of(request)
    model = service.check_model(body.model)
    tools = tools_of(body, service.files.tool_format)
    ids, thinking = await chat_prompt(service, body)
    max_tokens, name = _chat_max_tokens(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_value("top_logprobs", "top_logprobs: set logprobs to true as well")
    params = params_of(
        body,
        defaults=service.files.defaults,
        vocab_size=service.vocab_size,
        max_tokens=max_tokens,
        max_tokens_name=name,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_name="top_logprobs",
    )
    special = service.tokenizer.special_texts
    params = dataclasses.replace(params, grammar=chat_grammar(body, tools, thinking, special))
    if not set(_markers(tools, thinking)).isdisjoint(special):
        params = dataclasses.replace(params, skip_special_tokens=False)
    _check_prompt_logprobs(body)
    service.check_length(len(ids), max_tokens, name if max_tokens else "messages")
    await teach_vocabulary(service, [params.grammar])
    answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, service.fingerprint, [ids], params.n)
    generation = service.generate(call, [ids], [params], params.n, priority=body.priority, salt=body.cache_salt)
    view = ChatView(service.tokenizer, body, thinking, None if tools is None else (tools.form, tools.functions))
    extra: dict[str, Any] = {"prompt_token_ids": ids} if body.return_token_ids else {}
    return generation, answer, view, extra


def _markers(tools: Tools | None, thinking: Thinking) -> tuple[str, ...]:
    """What must not be hidden from those who read calls and thinking."""
    return (*(tools.form.markers if tools else ()), *((OPENING, CLOSING) if thinking is not Thinking.NEVER else ()))


async def chat_prompt(service: Service, body: Any) -> tuple[list[int], Thinking]:
    """Token ids of a request's messages, as the template writes them, and what the output will begin with."""
    variables = dict(body.chat_template_kwargs)
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        variables["reasoning_effort"] = effort
        if effort == "none":
            variables["enable_thinking"] = False
    if body.tools and getattr(body, "tool_choice", None) != "none":
        variables["tools"] = body.tools
    messages = check_messages(body.messages)
    text = service.render(messages, body.add_generation_prompt, body.continue_final_message, variables)
    ids = await service.encode(text, add_special_tokens=False)
    service.check_ids(ids, "messages")
    if not service.files.thinks:
        return ids, Thinking.NEVER
    return ids, Thinking.BEGUN if begins_inside(text) else Thinking.MAYBE


def _chat_max_tokens(body: ChatRequest) -> tuple[int | None, str]:
    """The limit and the name of the field it came from; max_completion_tokens wins."""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    value: int | None = getattr(body, name)
    if value is not None and value < 1:
        raise bad_value(name, f"{name}: expected an integer >= 1, got {value}")
    return value, name


def _check_prompt_logprobs(body: OpenAIRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise bad_value("prompt_logprobs", "prompt_logprobs: not available with stream")


async def completions(request: web.Request) -> web.StreamResponse:
    service, call = request.app[SERVICE], call_of(request)
    service.admit()
    body = await read_body(request, CompletionRequest)
    model = service.check_model(body.model)
    prompts = await _echoes(service, body)
    count = _num_candidates(body)
    params = _completion_params(service, body, count)
    await teach_vocabulary(service, [params.grammar])
    _check_prompt_logprobs(body)
    for prompt in prompts:
        service.check_length(len(prompt.ids), params.max_tokens, "max_tokens" if params.max_tokens else "prompt")
    ids = [prompt.ids for prompt in prompts]
    answer = Answer(f"cmpl-{uuid.uuid4().hex}", int(time.time()), model, service.fingerprint, ids, count)
    generation = service.generate(call, ids, [params] * len(ids), count, priority=body.priority, salt=body.cache_salt)
    view = CompletionView(service.tokenizer, body, prompts, body.n)
    return await _respond(request, body, generation, answer, view, {})


async def _echoes(service: Service, body: CompletionRequest) -> list[Echo]:
    """The request's prompts: a string, token ids, or a list of either."""
    made = []
    for index, prompt in enumerate(_split_prompts(body.prompt)):
        if isinstance(prompt, str):
            ids = await service.encode(prompt, add_special_tokens=body.add_special_tokens)
            text = prompt
        else:
            ids = prompt
            text = ""
        service.check_ids(ids, f"prompt[{index}]" if isinstance(body.prompt, list) else "prompt")
        made.append(Echo(text if text or not body.echo else service.tokenizer.decode(ids, skip_special_tokens=False), ids))
    return made


def _split_prompts(prompt: Prompt) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]
    if not prompt or len(kinds) > 1:
        raise bad_value("prompt", "prompt: expected a string, token ids, or a non-empty list of one kind of these")
    return prompt  # type: ignore[return-value]


def _num_candidates(body: CompletionRequest) -> int:
    """How many outputs are made for each prompt, of which `n` are returned."""
    if body.best_of is None:
        return body.n
    if body.best_of < body.n:
        raise bad_value("best_of", f"best_of: expected at least n = {body.n}, got {body.best_of}")
    if body.stream and body.best_of > body.n:
        raise bad_value("best_of", "best_of: more candidates than n are not available with stream")
    if body.best_of > 128:
        raise bad_value("best_of", f"best_of: expected at most 128, got {body.best_of}")
    return body.best_of


def _completion_params(service: Service, body: CompletionRequest, count: int) -> SamplingParams:
    ranked = count > body.n
    params = params_of(
        body,
        defaults=service.files.defaults,
        vocab_size=service.vocab_size,
        max_tokens=body.max_tokens,
        max_tokens_name="max_tokens",
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        logprobs_name="logprobs",
    )
    params = dataclasses.replace(params, grammar=plain_grammar(body))
    if body.echo and body.logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    return params


async def _respond(
    request: web.Request, body: OpenAIRequest, generation: Generation, answer: Answer, view: View, extra: dict[str, Any]
) -> web.StreamResponse:
    """The whole answer at once, or chunk by chunk. `extra` are further fields of the (first) body."""
    try:
        generation.name(answer.id)
        if body.request_id:
            generation.name(body.request_id)
        if body.stream:
            events = _events(generation, answer, view, body, extra)
            return await EventStream(request, request.app[STREAMS]).run(events, call_of(request))
        await generation.finish()
        chosen = _choose(generation.outputs, answer.count, body.n)
        choices = [view.whole(index, output) for index, output in enumerate(chosen)]
        if body.prompt_logprobs is not None and isinstance(view, ChatView):
            tokenizer = request.app[SERVICE].tokenizer
            extra = {**extra, "prompt_logprobs": prompt_logprobs(tokenizer, chosen[0].prompt_logprobs or [])}
        usage = answer.usage(generation.outputs, view)
        return json_response({**answer.head(view.kind), "choices": choices, "usage": usage, **extra})
    finally:
        generation.close()


def _choose(outputs: Sequence[Output], count: int, n: int) -> list[Output]:
    """The `n` outputs of each prompt with the highest log-probability per token, best first; all of them in order if n = count."""
    if n == count:
        return list(outputs)

    def mean(output: Output) -> float:
        return sum(entry.logprob for entry in output.logprobs) / max(len(output.logprobs), 1)

    groups = [outputs[start : start + count] for start in range(0, len(outputs), count)]
    return [output for group in groups for output in sorted(group, key=mean, reverse=True)[:n]]


async def _events(
    generation: Generation, answer: Answer, view: View, body: OpenAIRequest, extra: dict[str, Any]
) -> AsyncIterator[bytes]:
    """Chunks as encoded events: per choice an opening, pieces and an ending; usage at the very end if asked for."""
    outputs, options, extra = generation.outputs, body.stream_options, dict(extra)
    head = answer.head(view.chunk_kind)

    def chunk(choice: dict[str, Any]) -> bytes:
        body: dict[str, Any] = {**head, "choices": [choice]}
        if options.include_usage:
            body["usage"] = answer.usage(outputs, view) if options.continuous_usage_stats else None
        if extra:
            body.update(extra)
            extra.clear()
        return event(encode(body))

    async for choices in choices_of(generation, view):
        yield b"".join(map(chunk, choices))
    if options.include_usage:
        yield event(encode({**head, "choices": [], "usage": answer.usage(outputs, view)}))


async def choices_of(generation: Generation, view: View) -> AsyncIterator[list[dict[str, Any]]]:
    """Per engine step the choices of its chunks: each output begins with an opening and ends with an ending."""
    shown: dict[int, int] = {}
    async for index, text in generation:
        output, choices = generation.outputs[index], []
        if index not in shown:
            shown[index] = 0
            opening = view.opening(index, output)
            choices = [opening] if opening else []
        pieces = view.pieces(index, output, text, shown[index]) if text or output.done else []
        if pieces:
            choices += pieces
            shown[index] = len(output.token_ids)
        if output.done:
            choices.append(view.ending(index, output, shown[index]))
        if choices:
            yield choices
