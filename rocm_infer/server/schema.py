# SPDX-License-Identifier: Apache-2.0
"""Request bodies: which fields exist, their types, and how they become `SamplingParams`.

A field is served, ignored by design, known but not implemented (refused by name unless neutral), or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from rocm_infer.config import ConfigError, SamplingParams
from rocm_infer.server.errors import ApiError, bad_value, unsupported

Count = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Prompt = str | list[str | TokenId | list[TokenId]]
MAX_STOP_LEN = 4096

IGNORED = frozenset(["user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "verbosity"])

# Known to OpenAI, vLLM or SGLang clients, not implemented here; the listed values ask for nothing and pass.
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "stop_regex": ([], ""),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "truncate_prompt_tokens": (),
    "lora_path": (),
    "session_params": (),
    "input_embeds": (),
    "prompt_embeds": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "token_ids_logprob": (),
    "return_hidden_states": (False,),
    "documents": ([],),
}


class StreamOptions(Struct, kw_only=True, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Constraints(Struct, kw_only=True):
    """What an output must look like, in the spelling of SGLang. At most one may be given."""

    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None


class Sampling(Constraints, kw_only=True):
    """Sampling fields that both OpenAI routes share; None means the model's default."""

    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    seed: int | None = None
    n: Count = 1
    stop: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    min_tokens: Count = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = False
    prompt_logprobs: Count | None = None


class OpenAIRequest(Sampling, kw_only=True):
    """Fields of chat and completions beside sampling."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    priority: Count = 0
    cache_salt: str = ""
    request_id: str | None = None
    return_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatRequest(OpenAIRequest, kw_only=True):
    messages: list[Any]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    separate_reasoning: bool = True
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: Prompt
    max_tokens: Count | None = 16
    best_of: Count | None = None
    echo: bool = False
    logprobs: Count | None = None
    add_special_tokens: bool = True


class NativeSampling(Constraints, kw_only=True):
    """`sampling_params` of /generate."""

    max_new_tokens: Count | None = 128
    min_new_tokens: Count = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    sampling_seed: int | None = None
    n: Count = 1
    stop: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False


class NativeRequest(Struct, kw_only=True):
    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] = False
    logprob_start_len: Count | list[Count] = -1
    top_logprobs_num: Count | list[Count] = 0
    return_text_in_logprobs: bool = False
    priority: Count = 0


class TokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Any] = []
    return_token_strs: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool = False


class AbortBody(Struct, kw_only=True):
    rid: str | None = None
    abort_all: bool = False


# Fields of SamplingParams that requests carry under the same names (native requests rename two).
COPIED = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "seed", "n", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens"),
)

Body = TypeVar("Body", bound=Struct)


def decode_json(raw: bytes) -> dict[str, Any]:
    """A JSON object from a request's bytes."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(f"The request body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"The request body must be a JSON object, got {type(body).__name__}")
    return body


def parse(kind: type[Body], fields: Mapping[str, Any], *, where: str = "") -> tuple[Body, list[str]]:
    """A typed body and the names of its unknown fields. null means absent. `where` prefixes parameter names in errors."""
    given = {name: value for name, value in fields.items() if value is not None}
    served = kind.__struct_fields__
    unknown = []
    for name in given.keys() - set(served) - IGNORED:
        neutral = NOT_IMPLEMENTED.get(name)
        if neutral is None:
            unknown.append(name)
        elif given[name] not in neutral:
            raise unsupported(where + name, f"{where}{name} is not supported by this server yet; leave it out")
    try:
        return msgspec.convert(given, kind), sorted(unknown)
    except msgspec.ValidationError as error:
        raise _located(error, where) from error


def _located(error: msgspec.ValidationError, where: str) -> ApiError:
    """msgspec's message with the field it names as `param`."""
    text, _, path = str(error).partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", text)
    param = where + (missing[1] if missing else path.rstrip("`").lstrip("."))
    return bad_value(param or None, f"{param}: {text[0].lower()}{text[1:]}" if param else text)


def params_of(
    body: Sampling,
    *,
    defaults: Mapping[str, Any],
    vocab_size: int,
    max_tokens: int | None,
    max_tokens_name: str,
    logprobs: int | None,
    logprobs_name: str,
) -> SamplingParams:
    """Sampling parameters of an OpenAI request; errors carry the request's own field names."""
    fields = {name: getattr(body, name) for name in COPIED} | {
        "max_tokens": max_tokens,
        "include_stop": body.include_stop_str_in_output or body.no_stop_trim,
        "logprobs": logprobs,
        "prompt_logprobs": body.prompt_logprobs,
    }
    return make_params(fields, defaults, vocab_size, {"max_tokens": max_tokens_name, "logprobs": logprobs_name})


def native_params(
    body: NativeSampling, *, defaults: Mapping[str, Any], vocab_size: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """Sampling parameters of a /generate request."""
    source = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}
    fields = {name: getattr(body, source.get(name, name)) for name in COPIED} | {
        "max_tokens": body.max_new_tokens,
        "include_stop": body.no_stop_trim,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    names = {name: f"sampling_params.{field}" for name, field in source.items()} | {
        "max_tokens": "sampling_params.max_new_tokens",
        "logprobs": "top_logprobs_num",
        "prompt_logprobs": "top_logprobs_num",
    }
    return make_params(fields, defaults, vocab_size, names, prefix="sampling_params.")


def make_params(
    fields: dict[str, Any], defaults: Mapping[str, Any], vocab_size: int, names: Mapping[str, str], *, prefix: str = ""
) -> SamplingParams:
    """Checked parameters: None falls back to the model's defaults, -1 as top_k means all, stops and biases become tuples."""

    def name_of(field: str) -> str:
        return names.get(field, prefix + field)

    given = {name: defaults.get(name) if value is None else value for name, value in fields.items()}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    stop = chosen["stop"]
    chosen["stop_token_ids"] = tuple(chosen["stop_token_ids"])
    chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(len(text) > MAX_STOP_LEN for text in chosen["stop"]):
        raise bad_value(name_of("stop"), f"{name_of('stop')}: expected strings of at most {MAX_STOP_LEN} characters")
    chosen["logit_bias"] = _biases(chosen["logit_bias"], vocab_size, name_of("logit_bias"))
    try:
        params = SamplingParams(**chosen)
    except ConfigError as error:
        field = name_of(error.param)
        raise bad_value(field, str(error).replace(error.param, field, 1)) from error
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        field, limit = name_of("min_tokens"), name_of("max_tokens")
        raise bad_value(field, f"{field}: expected at most {limit} = {params.max_tokens}, got {params.min_tokens}")
    return params


def _biases(biases: Mapping[str, float], vocab_size: int, field: str) -> tuple[tuple[int, float], ...]:
    checked = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad_value(field, f"{field}: expected token ids from 0 to {vocab_size - 1} as keys, got {key!r}")
        checked.append((int(key), float(bias)))
    return tuple(checked)
