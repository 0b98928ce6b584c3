# SPDX-License-Identifier: Apache-2.0
"""The aiohttp application: routes, and what every route shares: request ids, keys, errors in one form, a log line."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from rocm_infer.server import info, messages, native, openai, openapi, page, profile, responses, schema
from rocm_infer.server.body import CALL, SERVICE, json_response
from rocm_infer.server.call import Call
from rocm_infer.server.errors import ApiError, from_chat, from_http, internal_error
from rocm_infer.server.openai import STREAMS
from rocm_infer.server.openapi import Route
from rocm_infer.server.service import Service
from rocm_infer.server.sse import OpenStreams
from rocm_infer.text.chat import ChatError

log = logging.getLogger("rocm_infer.server")
access_log = logging.getLogger("rocm_infer.access")

OPEN_PATHS = frozenset(("/health", "/health_generate", "/ready", "/live", "/ping", "/metrics", "/"))
MAX_ID_LEN = 128


ROUTES = (
    Route("GET", "/", page.chat_page, "A chat page"),
    Route("POST", "/v1/chat/completions", openai.chat_completions, "Answer a conversation", schema.ChatRequest),
    Route("POST", "/v1/completions", openai.completions, "Continue text", schema.CompletionRequest),
    Route("POST", "/v1/messages", messages.messages, "Answer a conversation, Anthropic's form", messages.MessagesRequest),
    Route("POST", "/v1/messages/count_tokens", messages.count_tokens, "Count its tokens", messages.CountTokensRequest),
    Route("POST", "/v1/responses", responses.responses, "Answer items, without stored state", responses.ResponsesRequest),
    Route("GET", "/v1/models", info.models, "The served models"),
    Route("GET", "/v1/models/{name:.+}", info.model, "One model"),
    Route("POST", "/tokenize", info.tokenize, "Text or messages to token ids", schema.TokenizeRequest),
    Route("POST", "/v1/tokenize", info.tokenize, "Text or messages to token ids", schema.TokenizeRequest),
    Route("POST", "/detokenize", info.detokenize, "Token ids to text", schema.DetokenizeRequest),
    Route("POST", "/v1/detokenize", info.detokenize, "Token ids to text", schema.DetokenizeRequest),
    Route("POST", "/generate", native.generate, "Continue text, SGLang's native form", schema.NativeRequest),
    Route("PUT", "/generate", native.generate, "Continue text, SGLang's native form", schema.NativeRequest),
    Route("GET", "/flush_cache", native.flush_cache, "Forget cached prefixes"),
    Route("POST", "/flush_cache", native.flush_cache, "Forget cached prefixes"),
    Route("POST", "/abort_request", native.abort_request, "Abort by request id", schema.AbortBody),
    Route("GET", "/start_profile", profile.start_profile, "Trace the engine's steps"),
    Route("POST", "/start_profile", profile.start_profile, "Trace the engine's steps", profile.ProfileBody, optional=True),
    Route("GET", "/stop_profile", profile.stop_profile, "Write the trace"),
    Route("POST", "/stop_profile", profile.stop_profile, "Write the trace"),
    Route("GET", "/health", info.health, "Ready, and the engine answers"),
    Route("GET", "/health_generate", info.health, "Same as /health"),
    Route("GET", "/ready", info.ready, "New work is accepted"),
    Route("GET", "/live", info.live, "The process is up"),
    Route("GET", "/ping", info.health, "Same as /health"),
    Route("GET", "/model_info", info.model_info, "The model"),
    Route("GET", "/get_model_info", info.model_info, "The model"),
    Route("GET", "/server_info", info.server_info, "Settings and statistics"),
    Route("GET", "/get_server_info", info.server_info, "Settings and statistics"),
    Route("GET", "/version", info.version, "The version"),
    Route("GET", "/metrics", info.metrics, "Prometheus metrics"),
)


def build_app(service: Service, streams: OpenStreams | None = None) -> web.Application:
    """All routes over one service."""
    app = web.Application(middlewares=[_shared], client_max_size=service.config.max_body_size)
    app[SERVICE] = service
    app[STREAMS] = streams or OpenStreams()
    app.on_response_prepare.append(_add_headers)
    app.cleanup_ctx.append(_watch_streams)
    document = msgspec.json.encode(openapi.document(ROUTES))
    app.router.add_get("/openapi.json", lambda _: _raw(document))
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    return app


async def _raw(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


async def _watch_streams(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.ensure_future(app[STREAMS].watch())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _request_id(request: web.Request) -> str:
    """The client's x-request-id where it is short printable ASCII, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    usable = 0 < len(given) <= MAX_ID_LEN and given.isascii() and given.isprintable()
    return given if usable else f"req-{uuid.uuid4().hex}"


def _check_key(request: web.Request, keys: tuple[str, ...]) -> None:
    """Compares against every key in constant time. Anthropic's clients send theirs as x-api-key."""
    if not keys or request.path in OPEN_PATHS:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("X-Api-Key", "")
    sent = given.strip().encode(errors="surrogateescape")
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
    if not any(matches):
        message = "Missing or wrong API key: send the header `Authorization: Bearer KEY`"
        raise ApiError(message, status=401, type="authentication_error", code="invalid_api_key")


def _check_origin(request: web.Request) -> None:
    """No web page of another origin may use this server: browsers say where a request comes from."""
    if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and request.path != "/":
        message = "Requests from web pages of other origins are refused; use a client outside the browser or the page at /"
        raise ApiError(message, status=403, type="permission_error", code="cross_origin")


@web.middleware
async def _shared(request: web.Request, handler: object) -> web.StreamResponse:
    """Names the request, checks the key, turns every failure into the nested error body, logs one line without content."""
    service = request.app[SERVICE]
    call = request[CALL] = Call(_request_id(request))
    status = 499
    try:
        response = await _answer(request, handler, service, call)
        status = response.status
        return response
    finally:
        service.metrics.responded(status)
        milliseconds = 1000 * (time.perf_counter() - call.started)
        fields = {
            "method": request.method,
            "path": request.rel_url.raw_path,
            "status": status,
            "ms": round(milliseconds, 1),
            "id": call.id,
        }
        level = logging.DEBUG if request.path in OPEN_PATHS and status == 200 else logging.INFO
        access_log.log(level, "%(method)s %(path)s %(status)s %(ms)s ms %(id)s", fields, extra={"fields": fields})


async def _answer(request: web.Request, handler: object, service: Service, call: Call) -> web.StreamResponse:
    try:
        _check_origin(request)
        _check_key(request, service.config.api_key)
        response: web.StreamResponse = await handler(request)  # type: ignore[operator]
        return response
    except ApiError as error:
        return _error_response(request, error)
    except ChatError as error:
        return _error_response(request, from_chat(error))
    except web.HTTPException as error:
        allowed = ", ".join(sorted(getattr(error, "allowed_methods", ())))
        shown = from_http(error.status, request.method, request.path, allowed, service.config.max_body_size)
        return _error_response(request, shown)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:
        log.exception("request %s failed", call.id)
        return _error_response(request, internal_error(call.id))


def _error_response(request: web.Request, error: ApiError) -> web.Response:
    body = error.body()
    if request.path.startswith("/v1/messages"):
        body = messages.error_body(error, request[CALL].id)
    return json_response(body, status=error.status, headers=error.headers())


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    call: Call | None = request.get(CALL)
    if call is not None:
        response.headers["x-request-id"] = call.id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - call.started)))
