# SPDX-License-Identifier: Apache-2.0
"""Reading request bodies, and the JSON responses of every route."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from rocm_infer.server.call import Call
from rocm_infer.server.errors import ApiError
from rocm_infer.server.schema import Body, decode_json, parse
from rocm_infer.server.service import Service

BODY_TIMEOUT = 300.0  # seconds in which a whole body must arrive
SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
CALL: web.RequestKey[Call] = web.RequestKey("call", Call)


def call_of(request: web.Request) -> Call:
    """The identity that the middleware gave this request."""
    return request[CALL]


async def read_fields(request: web.Request) -> dict[str, Any]:
    """The request's JSON object. Other content types are refused, so that no web page can post here unasked."""
    if request.content_type != "application/json":
        got = request.headers.get("Content-Type", "none")
        raise ApiError(f"Content-Type: expected application/json, got {got[:80]!r}", param="Content-Type")
    try:
        return decode_json(await asyncio.wait_for(request.read(), BODY_TIMEOUT))
    except asyncio.TimeoutError as error:
        raise ApiError(f"The request body did not arrive within {BODY_TIMEOUT:g} s", status=408, code="timeout") from error


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """The request's body as a checked structure."""
    body, unknown = parse(kind, await read_fields(request))
    request.app[SERVICE].note_unknown(unknown)
    return body


def json_response(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", charset="utf-8", headers=headers
    )
