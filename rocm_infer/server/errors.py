# SPDX-License-Identifier: Apache-2.0
"""Failures as OpenAI clients read them: a status and {"error": {message, type, param, code}} for every route."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.text.chat import ChatError

INVALID = "invalid_request_error"
REFUSALS = ("context_length_exceeded", "invalid_value", "duplicate_request_id")


class ApiError(Exception):
    """A request ends here; the middleware turns this into the response."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body())

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def bad_value(param: str | None, message: str) -> ApiError:
    return ApiError(message, param=param, code="invalid_value")


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields of the request that was translated: `names` are those of the translation and theirs."""
    try:
        yield
    except (ApiError, ChatError) as caught:
        error = from_chat(caught) if isinstance(caught, ChatError) else caught
        known = re.match(r"\w*", error.param or "")
        name = names.get(known[0]) if known and known[0] else None
        if known and name:
            error.param = name + str(error.param)[known.end() :]
            error.message = error.message.replace(known[0], name, 1)
        raise error from caught


def from_chat(error: ChatError) -> ApiError:
    return ApiError(str(error), param=error.param, code=error.code)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(message, param=param, code="unsupported_parameter")


def unavailable(code: str, message: str) -> ApiError:
    """`code`: starting, draining or unhealthy."""
    return ApiError(message, status=503, type="server_error", code=code, retry_after=5)


def model_not_found(name: object, served: tuple[str, ...]) -> ApiError:
    message = f"The model `{name}` does not exist; this server has {', '.join(f'`{other}`' for other in served)}"
    return ApiError(message, status=404, param="model", code="model_not_found")


def context_exceeded(limit: int, prompt_len: int, max_tokens: int | None, param: str) -> ApiError:
    wanted = prompt_len + (max_tokens or 0)
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {wanted} tokens ({prompt_len} in "
        f"the prompt, {max_tokens or 'at least 1'} in the completion). Please reduce the length of the prompt or completion."
    )
    return ApiError(message, param=param, code="context_length_exceeded")


def internal_error(request_id: str, message: str = "the server failed on this request") -> ApiError:
    return ApiError(f"{message} (request id {request_id})", status=500, type="server_error", code="internal_error")


def timed_out(request_id: str, message: str) -> ApiError:
    return ApiError(f"{message} (request id {request_id}, --request-timeout)", status=500, type="server_error", code="timeout")


def from_engine(error: ErrorInfo | None, request_id: str) -> ApiError:
    """What the engine reported for a request, as the client sees it."""
    if error is None:
        return internal_error(request_id)
    if error.code in REFUSALS:
        return ApiError(error.message, param=error.param, code=error.code)
    if error.code == "queue_full":
        return ApiError(error.message, status=429, type="rate_limit_error", code="queue_full", retry_after=1)
    if error.code == "timeout":
        return timed_out(request_id, error.message)
    return internal_error(request_id, error.message)


def from_http(status: int, method: str, path: str, allowed: str, limit: int) -> ApiError:
    """aiohttp's own refusals: unknown path, wrong method, body too large, ..."""
    if status == 404:
        return ApiError(f"Unknown path: {method} {path}", status=404, code="not_found")
    if status == 405:
        return ApiError(f"{path} does not answer {method}; it answers {allowed}", status=405, code="method_not_allowed")
    if status == 413:
        message = f"The request body is larger than {limit} bytes (--max-body-size)"
        return ApiError(message, status=413, code="request_too_large")
    return ApiError(f"The request was refused with HTTP status {status}", status=status)
