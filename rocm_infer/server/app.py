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

from aiohttp import web

from rocm_infer.server import info, native, openai
from rocm_infer.server.body import CALL, SERVICE
from rocm_infer.server.errors import ApiError, from_http, internal_error
from rocm_infer.server.openai import STREAMS
from rocm_infer.server.service import Call, Service
from rocm_infer.server.sse import OpenStreams
from rocm_infer.text.chat import ChatError

log = logging.getLogger("rocm_infer.server")
access_log = logging.getLogger("rocm_infer.access")

OPEN_PATHS = frozenset(("/health", "/health_generate", "/ready", "/live", "/ping", "/metrics"))
MAX_ID_LEN = 128


def build_app(service: Service, streams: OpenStreams | None = None) -> web.Application:
    """All routes over one service."""
    app = web.Application(middlewares=[_shared], client_max_size=service.config.max_body_size)
    app[SERVICE] = service
    app[STREAMS] = streams or OpenStreams()
    app.on_response_prepare.append(_add_headers)
    app.cleanup_ctx.append(_watch_streams)
    app.add_routes(
        [
            web.post("/v1/chat/completions", openai.chat_completions),
            web.post("/v1/completions", openai.completions),
            web.get("/v1/models", info.models),
            web.get("/v1/models/{name:.+}", info.model),
            web.post("/tokenize", info.tokenize),
            web.post("/v1/tokenize", info.tokenize),
            web.post("/detokenize", info.detokenize),
            web.post("/v1/detokenize", info.detokenize),
            web.post("/generate", native.generate),
            web.put("/generate", native.generate),
            web.get("/flush_cache", native.flush_cache),
            web.post("/flush_cache", native.flush_cache),
            web.post("/abort_request", native.abort_request),
            web.get("/health", info.health),
            web.get("/health_generate", info.health),
            web.get("/ready", info.ready),
            web.get("/live", info.live),
            web.get("/ping", info.health),
            web.get("/model_info", info.model_info),
            web.get("/get_model_info", info.model_info),
            web.get("/server_info", info.server_info),
            web.get("/get_server_info", info.server_info),
            web.get("/version", info.version),
            web.get("/metrics", info.metrics),
        ]
    )
    return app


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
    """Compares against every key in constant time."""
    if not keys or request.path in OPEN_PATHS:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    sent = given.strip().encode(errors="surrogateescape")
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        message = "Missing or wrong API key: send the header `Authorization: Bearer KEY`"
        raise ApiError(message, status=401, type="authentication_error", code="invalid_api_key")


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
        fields = {"method": request.method, "path": request.path, "status": status, "ms": round(milliseconds, 1), "id": call.id}
        access_log.info("%(method)s %(path)s %(status)s %(ms)s ms %(id)s", fields, extra={"fields": fields})


async def _answer(request: web.Request, handler: object, service: Service, call: Call) -> web.StreamResponse:
    try:
        _check_key(request, service.config.api_key)
        response: web.StreamResponse = await handler(request)  # type: ignore[operator]
        return response
    except ApiError as error:
        return _error_response(error)
    except ChatError as error:
        return _error_response(ApiError(str(error), param=error.param, code=error.code))
    except web.HTTPException as error:
        allowed = ", ".join(sorted(getattr(error, "allowed_methods", ())))
        shown = from_http(error.status, request.method, request.path, allowed, service.config.max_body_size)
        return _error_response(shown)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:
        log.exception("request %s failed", call.id)
        return _error_response(internal_error(call.id))


def _error_response(error: ApiError) -> web.Response:
    return web.Response(body=error.encode(), status=error.status, content_type="application/json", headers=error.headers())


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    call: Call | None = request.get(CALL)
    if call is not None:
        response.headers["x-request-id"] = call.id
        response.headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - call.started)))
