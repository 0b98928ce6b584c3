# SPDX-License-Identifier: Apache-2.0
"""One streamed request against a server, timed: native /generate, OpenAI completions, OpenAI chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

READ_BUFFER = 10 << 20
TIMEOUT_S = 6 * 3600


@dataclass
class Prompt:
    """What one request asks: text or token ids, their number, and how many tokens it wants."""

    text: str | list[int]
    input_len: int
    output_len: int


@dataclass
class Sampling:
    """The same for all requests of a run."""

    model: str
    temperature: float = 0.0
    top_p: float = 1.0
    ignore_eos: bool = True
    stream: bool = True
    return_logprob: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What was seen of one request; times in seconds. `itls` has one entry per token after the first chunk."""

    prompt: Prompt
    success: bool = False
    error: str = ""
    text: str = ""
    output_len: int = 0
    cached_len: int = 0
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)

    def arrived(self, text: str, num_tokens: int, now: float, last: float) -> None:
        """Account for a chunk that raised the token count to `num_tokens`."""
        if not self.ttft:
            self.ttft = now - self.start
        elif num_tokens > self.output_len:
            gained = num_tokens - self.output_len
            self.itls.extend([(now - last) / gained] * gained)
        self.text, self.output_len, self.latency = text, num_tokens, now - self.start


Client = Callable[[aiohttp.ClientSession, str, Prompt, Sampling], Awaitable[Result]]


def open_session(headers: dict[str, str]) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S), read_bufsize=READ_BUFFER, headers=headers
    )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a server-sent stream; a plain JSON body counts as one event."""
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        yield msgspec.json.decode(await response.read())
        return
    async for raw in response.content:
        line = raw.strip()
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield msgspec.json.decode(data)


async def _run(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    prompt: Prompt,
    read: Callable[[dict[str, Any], Result], tuple[str, int]],
) -> Result:
    """Send `body` and fold the events into a result; `read` gives the text and token count after an event."""
    result = Result(prompt)
    result.start = last = time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return result
            async for event in _events(response):
                if "error" in event:
                    result.error = str(event["error"])[:500]
                    return result
                text, num_tokens = read(event, result)
                now = time.perf_counter()
                if text != result.text or num_tokens > result.output_len:  # a token may have no text of its own
                    result.arrived(text, num_tokens, now, last)
                    last = now
        result.success = result.ttft > 0 or prompt.output_len == 0
        result.error = "" if result.success else "the stream ended without any token"
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def native(session: aiohttp.ClientSession, base_url: str, prompt: Prompt, sampling: Sampling) -> Result:
    """POST /generate: every event holds the whole text so far and the number of completion tokens."""
    body = {
        "input_ids" if isinstance(prompt.text, list) else "text": prompt.text,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": prompt.output_len,
            "ignore_eos": sampling.ignore_eos,
        },
        "stream": sampling.stream,
        "return_logprob": sampling.return_logprob,
        **sampling.extra,
    }

    def read(event: dict[str, Any], result: Result) -> tuple[str, int]:
        result.cached_len = event["meta_info"].get("cached_tokens", 0)
        return event["text"], event["meta_info"]["completion_tokens"]

    return await _run(session, base_url + "/generate", body, prompt, read)


def _openai_body(prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    body = {
        "model": sampling.model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": prompt.output_len,
        "ignore_eos": sampling.ignore_eos,
        "stream": sampling.stream,
        **sampling.extra,
    }
    if sampling.stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return body


def _read_usage(event: dict[str, Any], result: Result, chunk_text: str) -> int:
    """Completion tokens so far: from usage where the server sends it, else one per chunk with text."""
    usage = event.get("usage") or {}
    result.cached_len = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", result.cached_len)
    return usage.get("completion_tokens", result.output_len + bool(chunk_text))


async def completions(session: aiohttp.ClientSession, base_url: str, prompt: Prompt, sampling: Sampling) -> Result:
    """POST /v1/completions."""
    body = {**_openai_body(prompt, sampling), "prompt": prompt.text, **({"logprobs": 1} if sampling.return_logprob else {})}

    def read(event: dict[str, Any], result: Result) -> tuple[str, int]:
        chunk = event["choices"][0]["text"] if event.get("choices") else ""
        return result.text + chunk, _read_usage(event, result, chunk)

    return await _run(session, base_url + "/v1/completions", body, prompt, read)


async def chat(session: aiohttp.ClientSession, base_url: str, prompt: Prompt, sampling: Sampling) -> Result:
    """POST /v1/chat/completions with the prompt as one user message."""
    if not isinstance(prompt.text, str):
        raise SystemExit("a chat backend needs prompts as text: choose another --dataset-name or drop --tokenize-prompt")
    body = {**_openai_body(prompt, sampling), "messages": [{"role": "user", "content": prompt.text}]}
    if sampling.return_logprob:
        body["logprobs"] = True

    def read(event: dict[str, Any], result: Result) -> tuple[str, int]:
        choice = event["choices"][0] if event.get("choices") else {}
        delta = choice.get("delta") or choice.get("message") or {}
        chunk = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        return result.text + chunk, _read_usage(event, result, chunk)

    return await _run(session, base_url + "/v1/chat/completions", body, prompt, read)


CLIENTS: dict[str, Client] = {
    "rocm-infer": native,
    "rocm-infer-oai": completions,
    "rocm-infer-chat": chat,
    "sglang": native,
    "sglang-oai": completions,
    "sglang-oai-chat": chat,
    "vllm": completions,
    "vllm-chat": chat,
}
DEFAULT_PORTS = {"vllm": 8000, "vllm-chat": 8000}
