# SPDX-License-Identifier: Apache-2.0
"""What the checks of `rocm-infer conform` are made of: a server under test, its answers, and expectations that say what was got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

QUESTION = "What is the sum of 12 and 30?"
USER = [{"role": "user", "content": QUESTION}]


class Failed(Exception):
    """A check did not hold."""

    def __init__(self, what: str, expected: Any, got: Any) -> None:
        super().__init__(what)
        self.what, self.expected, self.got = what, _short(expected), _short(got)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 300 else text[:300] + "..."


def equal(got: Any, expected: Any, what: str) -> None:
    if got != expected or (type(got) is bool and type(expected) is not bool):
        raise Failed(what, expected, got)


def ensure(condition: Any, what: str, expected: str, got: Any) -> None:
    if not condition:
        raise Failed(what, expected, got)


def among(got: Any, allowed: tuple[Any, ...], what: str) -> None:
    ensure(got in allowed, what, f"one of {allowed}", got)


@dataclass(frozen=True)
class Check:
    """`id` is area.name, `says` what must hold in one line. One that is `alone` runs when no other does."""

    id: str
    says: str
    run: Callable[[Target], Awaitable[None]]
    alone: bool = False


@dataclass
class Area:
    """The checks of one part of the contract, in order."""

    name: str
    checks: list[Check] = field(default_factory=list)

    def check(
        self, name: str, says: str, *, alone: bool = False
    ) -> Callable[[Callable[[Target], Awaitable[None]]], Callable[[Target], Awaitable[None]]]:
        def add(run: Callable[[Target], Awaitable[None]]) -> Callable[[Target], Awaitable[None]]:
            self.checks.append(Check(f"{self.name}.{name}", says, run, alone))
            return run

        return add


@dataclass(frozen=True)
class Reply:
    """A whole answer; `body` is decoded JSON, or None."""

    status: int
    headers: Mapping[str, str]
    text: str
    body: Any


@dataclass(frozen=True)
class Events:
    """A stream to its end: `raw` text, decoded `chunks`, event `names` (for streams that have them), and whether [DONE] ended it."""

    headers: Mapping[str, str]
    raw: str
    chunks: list[Any]
    names: list[str]
    done: bool

    def choices(self, index: int = 0) -> list[dict[str, Any]]:
        return [choice for chunk in self.chunks for choice in chunk.get("choices", ()) if choice.get("index") == index]

    def deltas(self, index: int = 0) -> list[dict[str, Any]]:
        return [choice.get("delta", {}) for choice in self.choices(index)]

    def content(self, index: int = 0) -> str:
        return "".join(delta.get("content") or "" for delta in self.deltas(index))

    def text(self, index: int = 0) -> str:
        return "".join(choice.get("text") or "" for choice in self.choices(index))


class Target:
    """A server. Requests name its model unless they name another; sampling is greedy unless they say otherwise."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str, api_key: str | None) -> None:
        self.session, self.base_url, self.model, self.api_key = session, base_url.rstrip("/"), model, api_key
        self._known: dict[str, asyncio.Future[Any]] = {}

    def headers(self, given: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """The key, and what is given; None leaves a header out."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {name: value for name, value in {**key, **(given or {})}.items() if value is not None}

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Reply:
        """`body` goes as JSON, `data` as it is."""
        sent = self.headers(headers)
        if body is not None:
            data = json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        async with self.session.request(method, self.base_url + path, data=data, headers=sent) as response:
            text = (await response.read()).decode("utf-8", "replace")
            try:
                decoded = json.loads(text)
            except ValueError:
                decoded = None
            return Reply(response.status, response.headers, text, decoded)

    async def get(self, path: str, headers: Mapping[str, str | None] | None = None) -> Reply:
        return await self.send("GET", path, headers=headers)

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The body of an answer that must be 200."""
        reply = await self.send("POST", path, {"model": self.model, **body})
        ensure(reply.status == 200, f"POST {path}", "status 200", f"{reply.status} {reply.text}")
        return reply.body

    async def chat(self, **fields: Any) -> Any:
        return await self.ask("/v1/chat/completions", chat_body(fields))

    async def complete(self, **fields: Any) -> Any:
        return await self.ask("/v1/completions", completion_body(fields))

    async def said(self, **fields: Any) -> str:
        """The content of a chat answer's only choice."""
        content: str = (await self.chat(**fields))["choices"][0]["message"]["content"]
        return content

    async def chat_events(self, **fields: Any) -> Events:
        return await self.events("/v1/chat/completions", chat_body({"stream": True, **fields}))

    async def completion_events(self, **fields: Any) -> Events:
        return await self.events("/v1/completions", completion_body({"stream": True, **fields}))

    async def events(self, path: str, body: dict[str, Any]) -> Events:
        reply = await self.send("POST", path, {"model": self.model, **body})
        ensure(reply.status == 200, f"POST {path}, streaming", "status 200", f"{reply.status} {reply.text}")
        names, chunks, done = [], [], False
        for line in reply.text.splitlines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                ensure(not done, "events after [DONE]", "none", data)
                done = data == "[DONE]"
                if not done:
                    chunks.append(json.loads(data))
        return Events(reply.headers, reply.text, chunks, names, done)

    async def tokens(self, text: str, *, special: bool = False) -> list[int]:
        found: list[int] = (await self.ask("/tokenize", {"prompt": text, "add_special_tokens": special}))["tokens"]
        return found

    async def no_blanks(self) -> dict[str, int]:
        """A logit_bias against blanks: a model that was never trained on JSON may fill the places where blanks are allowed."""
        ids = await self.once("blanks", lambda: asyncio.gather(*map(self.tokens, (" ", "\n", "\t", "\r"))))
        return {str(found[0]): -100 for found in ids if len(found) == 1}

    async def once(self, name: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """What `make` gives, made once for all checks that look at it."""
        if name not in self._known:
            self._known[name] = asyncio.ensure_future(make())
        return await asyncio.shield(self._known[name])

    async def plain(self) -> Any:
        """A short chat answer."""
        return await self.once("plain", lambda: self.chat(max_tokens=24))

    async def long(self) -> Any:
        """32 greedy tokens after the question, as a completion with its token ids."""
        return await self.once("long", lambda: self.complete(max_tokens=32, ignore_eos=True, return_token_ids=True))

    async def streamed(self) -> Events:
        """The stream of `plain`, with usage."""
        found: Events = await self.once(
            "streamed", lambda: self.chat_events(max_tokens=24, stream_options={"include_usage": True})
        )
        return found

    async def refused(
        self,
        path: str,
        body: Any,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        data: bytes | None = None,
    ) -> dict[str, Any]:
        """A request that must fail; returns the error, whose form is checked."""
        full = {"model": self.model, **body} if isinstance(body, dict) else body
        reply = await self.send("POST", path, full, data=data)
        error = error_of(reply, status)
        if param is not None:
            ensure(str(error["param"]).startswith(param), "error.param", param, error["param"])
        if code is not None:
            equal(error["code"], code, "error.code")
        return error

    async def chat_refused(self, param: str | None, *, code: str | None = None, **fields: Any) -> None:
        await self.refused("/v1/chat/completions", chat_body({"max_tokens": 4, **fields}), param=param, code=code)


def chat_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": USER, "temperature": 0, **fields}


def completion_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": QUESTION, "temperature": 0, **fields}


def error_of(reply: Reply, status: int) -> dict[str, Any]:
    """The error of a failed answer, whose status and form are checked."""
    equal(reply.status, status, "status")
    ensure(isinstance(reply.body, dict) and set(reply.body) == {"error"}, "error body", '{"error": {...}} alone', reply.text)
    error: dict[str, Any] = reply.body["error"]
    ensure(isinstance(error, dict), "error", "an object", error)
    equal(sorted(error), ["code", "message", "param", "type"], "members of error")
    ensure(isinstance(error["message"], str) and error["message"], "error.message", "a text", error["message"])
    ensure("Traceback" not in error["message"], "error.message", "no stack", error["message"])
    return error
