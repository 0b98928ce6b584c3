# SPDX-License-Identifier: Apache-2.0
"""What --log-requests tells of a request when it ends. Nothing that a client wrote is told below the level "params"."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from rocm_infer.config import SamplingParams
from rocm_infer.engine.messages import AddRequest
from rocm_infer.server.call import Call
from rocm_infer.text.outputs import Output
from rocm_infer.text.tokenizer import Tokenizer

log = logging.getLogger("rocm_infer.requests")


def log_request(
    level: str, tokenizer: Tokenizer, call: Call, requests: Sequence[AddRequest], outputs: Sequence[Output]
) -> None:
    """One line. `level`: none, metadata (counts and times), params (also what was set), content (also the texts)."""
    if level == "none" or not requests:
        return
    fields: dict[str, Any] = {
        "id": call.id,
        "seconds": round(time.perf_counter() - call.started, 4),
        "outputs": [
            {
                "prompt_tokens": len(request.prompt_ids),
                "cached_tokens": output.num_cached,
                "completion_tokens": len(output.token_ids),
                "finish_reason": output.finish_reason,
            }
            for request, output in zip(requests, outputs, strict=True)
        ],
    }
    if level in ("params", "content"):
        fields["params"] = _changed(requests[0].params)
    if level == "content":
        for shown, request, output in zip(fields["outputs"], requests, outputs, strict=True):
            shown["prompt"] = tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
            shown["text"] = output.text
    log.info("request ended: %s", json.dumps(fields), extra={"fields": fields})


def _changed(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not neutral, as JSON data."""
    neutral = SamplingParams()
    names = [item.name for item in dataclasses.fields(params)]
    changed = {name: getattr(params, name) for name in names if getattr(params, name) != getattr(neutral, name)}
    plain: dict[str, Any] = msgspec.to_builtins(changed)
    return plain
