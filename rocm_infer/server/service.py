# SPDX-License-Identifier: Apache-2.0
"""What stands between HTTP and the engine: names, texts, limits, and generations under way."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rocm_infer import __version__
from rocm_infer.config import EngineConfig, SamplingParams, ServerConfig
from rocm_infer.engine.client import EngineClient
from rocm_infer.engine.messages import AddRequest
from rocm_infer.server.call import Call
from rocm_infer.server.errors import (
    ApiError,
    bad_value,
    context_exceeded,
    model_not_found,
    unavailable,
)
from rocm_infer.server.generation import Generation
from rocm_infer.server.metrics import Metrics
from rocm_infer.text.chat import ChatError, ChatTemplate, Message
from rocm_infer.text.files import read_json, sampling_defaults
from rocm_infer.text.outputs import fan_out
from rocm_infer.text.reasoning import thinks
from rocm_infer.text.tokenizer import Tokenizer
from rocm_infer.text.tools import FORMATS, ToolFormat, format_of

log = logging.getLogger("rocm_infer.server")

Phase = Literal["starting", "ready", "draining", "unhealthy"]
LONG_TEXT = 8192  # characters; longer texts are encoded in a thread
MAX_REMEMBERED_NAMES = 1000


@dataclass(frozen=True)
class ModelFiles:
    """What the server reads of a checkpoint: tokenizer, chat template, generation defaults, config.json."""

    path: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: Mapping[str, Any]
    hf_config: Mapping[str, Any]
    tool_format: ToolFormat

    @property
    def thinks(self) -> bool:
        """Whether outputs may begin with <think>."""
        return self.template is not None and thinks(self.template.source)


def load_model_files(path: Path, server: ServerConfig, tokenizer_path: Path | None = None) -> ModelFiles:
    """Reads the text side of a checkpoint. Raises TextFileError or ChatError with what to do."""
    where = tokenizer_path or path
    tokenizer = Tokenizer.load(where)
    override = Path(server.chat_template) if server.chat_template else None
    template = ChatTemplate.load(where, tokenizer, override)
    defaults = {} if server.generation_config == "none" else sampling_defaults(path)
    source = "" if template is None else template.source
    tools = format_of(source) if server.tool_call_parser == "auto" else FORMATS[server.tool_call_parser]
    return ModelFiles(path, tokenizer, template, defaults, read_json(path / "config.json"), tools)


class Service:
    """The server's state. Routes ask it for prompts, parameters' limits and generations; `lifecycle` moves its phase."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, files: ModelFiles, client: EngineClient) -> None:
        self.engine_config = engine
        self.config = server
        self.files = files
        self.tokenizer = files.tokenizer
        self.client = client
        self.names: tuple[str, ...] = server.served_model_name or (engine.model,)
        self.metrics = Metrics(self.names[0], server.metrics_compat)
        self.phase: Phase = "starting"
        self.reason = "the model is being loaded"
        self.created = int(time.time())
        self.num_crashes = 0
        self.last_answer = time.perf_counter()
        self._running: dict[str, set[Generation]] = {}
        self._logged_names: set[str] = set()

    @property
    def context_len(self) -> int:
        return int(self.client.info.get("context_length", 0))

    @property
    def vocab_size(self) -> int:
        return int(self.client.info.get("vocab_size", self.tokenizer.vocab_size))

    @property
    def fingerprint(self) -> str:
        """Names the build, model and numerics that answered."""
        info = self.client.info
        parts = (__version__, info.get("model"), info.get("architecture"), info.get("dtype"), info.get("device"))
        return "ri-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def num_running(self) -> int:
        """Generations under way."""
        return len({generation for known in self._running.values() for generation in known})

    def enter(self, phase: Phase, reason: str) -> None:
        """Moves to another phase; draining is final."""
        if self.phase != "draining":
            self.phase, self.reason = phase, reason

    def admit(self) -> None:
        """Raises 503 unless new work is accepted."""
        if self.phase != "ready":
            raise unavailable(self.phase, f"The server is {self.phase}: {self.reason}")

    def check_model(self, name: str | None) -> str:
        """The served name a request means; absent means the first one."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise model_not_found(name, self.names)
        return name

    def note_unknown(self, names: Iterable[str], where: str = "") -> None:
        """Unknown request fields: refused with --strict-params, else logged once per name."""
        for name in names:
            if self.config.strict_params:
                raise bad_value(where + name, f"{where}{name}: unknown field (--strict-params is on)")
            if name not in self._logged_names and len(self._logged_names) < MAX_REMEMBERED_NAMES:
                self._logged_names.add(name)
                log.warning("ignoring unknown request field %r", where + name[:80])

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def render(
        self, messages: list[Message], add_generation_prompt: bool | None, continue_final: bool, variables: dict[str, Any]
    ) -> str:
        """Chat messages as prompt text."""
        if self.files.template is None:
            raise ApiError(
                "this model has no chat template: start the server with --chat-template FILE, or use /v1/completions",
                param="messages",
                code="unsupported_value",
            )
        prompted = not continue_final if add_generation_prompt is None else add_generation_prompt
        try:
            return self.files.template.render(
                messages, add_generation_prompt=prompted, continue_final_message=continue_final, variables=variables
            )
        except ChatError as error:
            raise ApiError(str(error), param=error.param, code=error.code) from error

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Token ids given by a client must be in the vocabulary."""
        if not ids:
            raise bad_value(param, f"{param}: expected at least one token")
        worst = max(ids)
        if worst >= self.vocab_size:
            raise bad_value(param, f"{param}: expected token ids below {self.vocab_size}, got {worst}")

    def check_length(self, prompt_len: int, max_tokens: int | None, param: str) -> None:
        """Prompt and output must fit the context; without `max_tokens` at least one token must."""
        wanted = prompt_len + (1 if max_tokens is None else max_tokens)
        if wanted > self.context_len:
            raise context_exceeded(self.context_len, prompt_len, max_tokens, param)

    def generate(
        self,
        call: Call,
        prompts: list[list[int]],
        params: Sequence[SamplingParams],
        count: int,
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> Generation:
        """Starts `count` outputs for each prompt (`params` has one entry per prompt). The caller closes it.

        Requests with the same `salt` share cached prefixes, others do not. What is not finished after `timeout` seconds
        (None: --request-timeout, 0: never) ends with the error "timeout".
        """
        most = self.engine_config.max_queued_requests + self.engine_config.max_running_requests
        if len(prompts) * count > most:
            raise bad_value("prompt", f"at most {most} outputs in one request, got {len(prompts) * count}")
        if not self.client.num_requests:
            self.last_answer = time.perf_counter()
        generation = Generation(self, call)
        self.metrics.num_outputs.observe(count)
        for prompt_ids, shared in zip(prompts, params, strict=True):
            for single in fan_out(shared, count):
                generation.add(AddRequest(f"{call.id}-{uuid.uuid4().hex}", prompt_ids, single, priority, salt))
        seconds = self.config.request_timeout if timeout is None else timeout
        if seconds:
            generation.limit(seconds)
        return generation

    def register(self, name: str, generation: Generation) -> None:
        self._running.setdefault(name, set()).add(generation)

    def unregister(self, name: str, generation: Generation) -> None:
        known = self._running.get(name, set())
        known.discard(generation)
        if not known:
            self._running.pop(name, None)

    def abort(self, name: str) -> int:
        """Aborts what runs under a request id; returns how many generations that were."""
        found = self._running.get(name, set())
        for generation in found:
            generation.abort()
        return len(found)

    async def refresh_metrics(self) -> None:
        """Asks the engine for its statistics, as far as it answers in time."""
        info, size, total = self.client.info, 0, 0
        if info:
            size, total = int(info.get("page_size", 0)), int(info.get("max_total_tokens", 0))
            geometry = {
                "block_size": size,
                "page_size": size,
                "num_gpu_blocks": total // max(size, 1),
                "max_total_tokens": total,
            }
            self.metrics.engine.info = {name: str(value) for name, value in geometry.items()}
        if self.client.state == "ready":
            try:
                values = await asyncio.wait_for(self.client.stats(), 2.0)
            except (TimeoutError, asyncio.TimeoutError, RuntimeError):
                log.debug("no engine statistics")
            else:
                self.metrics.engine.update({**values, "page_size": size, "max_total_tokens": total})
