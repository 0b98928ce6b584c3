# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document, made from the route table and the request types."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from rocm_infer import __version__

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True)
class Route:
    """One method of one path; `body` is the type of its JSON request body, which may be absent where it is `optional`."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    summary: str
    body: type[msgspec.Struct] | None = None
    optional: bool = False


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1, as plain data."""
    types = {route.body for route in routes if route.body is not None}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(re.sub(r":[^}]*}", "}", route.path), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "rocm_infer", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    error = {"description": "failure", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{re.sub('[^a-z0-9]+', '_', route.path.split(':')[0])}",
        "responses": {"200": {"description": "success"}, "default": error},
    }
    names = re.findall(r"{(\w+)", route.path)
    if names:
        string = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": string} for name in names]
    if route.body is not None:
        reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": not route.optional, "content": {"application/json": {"schema": reference}}}
    return operation
