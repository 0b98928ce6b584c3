# SPDX-License-Identifier: Apache-2.0
"""/start_profile and /stop_profile: traces of the engine's steps, written below --profile-dir and nowhere else."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path
from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta, Struct

from rocm_infer.engine.capsule import default_folder
from rocm_infer.engine.messages import Profiled
from rocm_infer.server.body import SERVICE, json_response, read_body
from rocm_infer.server.errors import ApiError, bad_value, unavailable
from rocm_infer.server.service import Service

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProfileBody(Struct, kw_only=True):
    """`output_dir`: a folder name below --profile-dir. `num_steps`: how many steps to trace, absent until /stop_profile."""

    output_dir: str | None = None
    num_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    activities: tuple[Literal["CPU", "GPU"], ...] = ("CPU", "GPU")
    with_stack: bool = False
    record_shapes: bool = False


async def start_profile(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.admit()
    body = await read_body(request, ProfileBody) if request.body_exists else ProfileBody()
    folder = _folder(service, body.output_dir)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.trace.json.gz"
    try:
        reply = await service.client.start_profile(
            path,
            body.num_steps or 0,
            body.activities,
            with_stack=body.with_stack,
            record_shapes=body.record_shapes,
        )
    except RuntimeError as error:
        raise unavailable("unhealthy", f"No profile was started: {error}") from error
    return _told(reply, "Start profiling.")


async def stop_profile(request: web.Request) -> web.Response:
    """Answers when the trace is written."""
    service = request.app[SERVICE]
    try:
        reply = await service.client.stop_profile()
    except RuntimeError as error:
        raise unavailable("unhealthy", f"No profile was stopped: {error}") from error
    return _told(reply, "Stop profiling.")


def _folder(service: Service, name: str | None) -> Path:
    """--profile-dir, or a folder in it. A request never says a path."""
    base = Path(service.config.profile_dir) if service.config.profile_dir else default_folder("profiles")
    if name is None:
        return base
    if not FOLDER_NAME.fullmatch(name):
        message = "output_dir: expected a folder name (letters, digits, . _ -), which is made below the server's --profile-dir"
        raise bad_value("output_dir", message)
    return base / name


def _told(reply: Profiled, message: str) -> web.Response:
    if reply.error is not None:
        raise ApiError(reply.error)
    return json_response({"message": message, "path": reply.path})
