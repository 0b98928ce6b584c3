# SPDX-License-Identifier: Apache-2.0
"""Routes that tell: models, tokens, health, configuration, metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rocm_infer import __version__
from rocm_infer.server.body import SERVICE, json_response, read_body
from rocm_infer.server.errors import bad_value, model_not_found, unavailable
from rocm_infer.server.openai import chat_prompt
from rocm_infer.server.schema import DetokenizeRequest, TokenizeRequest
from rocm_infer.server.service import Service

PROBE_SECONDS = 2.0


def _model_card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "rocm-infer",
        "root": service.engine_config.model,
        "parent": None,
        "max_model_len": service.context_len or None,
    }


async def models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [_model_card(service, name) for name in service.names]})


async def model(request: web.Request) -> web.Response:
    service, name = request.app[SERVICE], request.match_info["name"]
    if name not in service.names:
        raise model_not_found(name, service.names)
    return json_response(_model_card(service, name))


async def tokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_value("prompt", "expected exactly one of prompt and messages")
    if body.prompt is None:
        ids, _ = await chat_prompt(service, body)
    else:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = await service.encode(body.prompt, add_special_tokens=special)
    shown: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.context_len}
    if body.return_token_strs:
        shown["token_strs"] = [service.tokenizer.token(token_id) for token_id in ids]
    return json_response(shown)


async def detokenize(request: web.Request) -> web.Response:
    """The text under both names in use: `prompt` (vLLM) and `text` (SGLang)."""
    service = request.app[SERVICE]
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model)
    if body.tokens:
        service.check_ids(body.tokens, "tokens")
    text = service.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return json_response({"prompt": text, "text": text})


async def _engine_failure(service: Service) -> str | None:
    """Why the engine cannot be relied on: its worker is gone, or has been silent for longer than a step may take."""
    if service.client.state != "ready":
        return service.client.failure or "the engine worker is not running"
    try:
        await asyncio.wait_for(service.client.stats(), PROBE_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):
        silent = time.perf_counter() - service.last_answer
        if silent > service.engine_config.step_timeout:
            return f"the engine has not answered for {silent:.0f} s"
        return None
    except RuntimeError as error:
        return str(error)
    service.last_answer = time.perf_counter()
    return None


async def health(request: web.Request) -> web.Response:
    """200 only when new work is accepted and the engine answers, or is within one step's time of its last answer."""
    service = request.app[SERVICE]
    service.admit()
    failure = await _engine_failure(service)
    if failure is not None:
        raise unavailable("unhealthy", f"The server is unhealthy: {failure}")
    return json_response(_state(service))


async def ready(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.admit()
    return json_response(_state(service))


async def live(request: web.Request) -> web.Response:
    """The process is up, whatever it can do."""
    return json_response(_state(request.app[SERVICE]))


def _state(service: Service) -> dict[str, Any]:
    return {
        "status": service.phase,
        "version": __version__,
        "seconds_since_engine_answer": round(time.perf_counter() - service.last_answer, 3),
        "system_fingerprint": service.fingerprint,
    }


async def model_info(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    engine, config = service.engine_config, service.files.hf_config
    return json_response(
        {
            "model_path": engine.model,
            "tokenizer_path": engine.tokenizer or engine.model,
            "served_model_name": service.names[0],
            "is_generation": True,
            "preferred_sampling_params": dict(service.files.defaults) or None,
            "weight_version": "default",
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
            "max_model_len": service.context_len or None,
        }
    )


async def server_info(request: web.Request) -> web.Response:
    """The settings in effect, what the engine made of them, and its statistics now. Never the keys."""
    service = request.app[SERVICE]
    await service.refresh_metrics()
    settings = dataclasses.asdict(service.engine_config) | dataclasses.asdict(service.config)
    settings["api_key"] = len(service.config.api_key)
    return json_response(
        {
            **settings,
            "version": __version__,
            "status": service.phase,
            "num_crashes": service.num_crashes,
            "engine": service.client.info,
            "internal_states": [dict(service.metrics.engine.values)],
        }
    )


async def version(request: web.Request) -> web.Response:
    return json_response({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    await service.refresh_metrics()
    return web.Response(body=service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
