# SPDX-License-Identifier: Apache-2.0
"""The outputs of one HTTP request, from the engine's steps to text, with their measurements."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from rocm_infer.engine.client import RequestStream
from rocm_infer.engine.messages import AddRequest, RequestOutput
from rocm_infer.server.call import Call
from rocm_infer.server.errors import from_engine, internal_error
from rocm_infer.server.request_log import log_request
from rocm_infer.text.outputs import Output

if TYPE_CHECKING:
    from rocm_infer.server.service import Service


class Generation:
    """The outputs of one HTTP request while they grow: `async for index, new_text in generation`.

    Output `index` is prompt_index * count + choice. Raises ApiError when one of them fails. `close` aborts what still runs.
    """

    def __init__(self, service: Service, call: Call) -> None:
        self._service = service
        self._call = call
        self._streams: list[RequestStream] = []
        self._requests: list[AddRequest] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._names = [call.id]
        self._first_token: list[float] = []
        self._last_token: list[float] = []
        self._queue_seconds: list[float] = []
        self.outputs: list[Output] = []
        service.register(call.id, self)

    def add(self, request: AddRequest) -> None:
        self._requests.append(request)
        self._streams.append(self._service.client.add(request))
        self.outputs.append(Output(self._service.tokenizer, request.params))
        self._first_token.append(0.0)
        self._last_token.append(0.0)
        self._queue_seconds.append(0.0)
        if request.params.max_tokens is not None:
            self._service.metrics.max_tokens.observe(request.params.max_tokens)

    def limit(self, seconds: float) -> None:
        """Ends what is not finished after so many seconds."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        for request in self._requests:
            self._service.client.expire(request.rid, seconds)

    def name(self, alias: str) -> None:
        """Another id under which a client may abort this."""
        self._names.append(alias)
        self._service.register(alias, self)

    def abort(self) -> None:
        """Ends every output as the engine ends it: finish_reason "abort"."""
        for request in self._requests:
            self._service.client.abort(request.rid)

    def close(self) -> None:
        """Stops whatever still runs and forgets the generation. May be called more than once."""
        if self._deadline is not None:
            self._deadline.cancel()
        for task in self._tasks:
            task.cancel()
        for stream, output in zip(self._streams, self.outputs, strict=True):
            if not output.done:
                self._service.metrics.finished("abort")
                output.finish_reason = "abort"
            stream.close()
        if self._names:
            level = self._service.config.log_requests
            log_request(level, self._service.tokenizer, self._call, self._requests, self.outputs)
        for name in self._names:
            self._service.unregister(name, self)
        self._names = []

    async def finish(self) -> None:
        """Waits for the end of every output."""
        async for _ in self:
            pass

    async def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        running = len(self.outputs)
        async for index, step in self._steps():
            output = self.outputs[index]
            if output.done:
                continue
            text = output.feed(step)
            self._measure(index, step)
            if output.finish_reason == "error":
                self._service.metrics.finished("error")
                raise from_engine(output.error, self._call.id)
            if output.done:
                self._ended(index, step)
                running -= 1
            if not running:
                self._service.metrics.longest_output.observe(max(len(output.token_ids) for output in self.outputs))
            yield index, text
            if not running:
                return
        raise internal_error(self._call.id, "the engine ended the request without a reason")

    async def _steps(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """What the engine says, of all outputs as it comes."""
        if len(self._streams) == 1:
            async for step in self._streams[0]:
                yield 0, step
            return
        queue: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()

        async def pump(index: int) -> None:
            async for step in self._streams[index]:
                queue.put_nowait((index, step))
            queue.put_nowait((index, RequestOutput("", [], "error")))  # ignored unless the stream broke off

        self._tasks = [asyncio.ensure_future(pump(index)) for index in range(len(self._streams))]
        while True:
            yield await queue.get()

    def _measure(self, index: int, step: RequestOutput) -> None:
        now = self._service.last_answer = time.perf_counter()
        if not step.token_ids:
            return
        metrics, last = self._service.metrics, self._last_token[index]
        metrics.generation_tokens.inc(len(step.token_ids))
        if last:
            metrics.between_tokens.observe((now - last) / len(step.token_ids))
        else:
            self._first_token[index] = now
            queued = self._queue_seconds[index] = step.queue_seconds or 0.0
            metrics.first_token.observe(now - self._call.started)
            metrics.queue_time.observe(queued)
            metrics.prefill_time.observe(max(0.0, now - self._call.started - queued))
        self._last_token[index] = now

    def _ended(self, index: int, step: RequestOutput) -> None:
        output, metrics = self.outputs[index], self._service.metrics
        if step.finish_reason is None:
            self._streams[index].close()
        metrics.finished(output.finish_reason or "error")
        metrics.prompt_tokens.inc(output.num_prompt)
        metrics.prompt_len.observe(output.num_prompt)
        metrics.output_len.observe(len(output.token_ids))
        seconds = time.perf_counter() - self._call.started
        metrics.end_to_end.observe(seconds)
        metrics.inference_time.observe(max(0.0, seconds - self._queue_seconds[index]))
        metrics.decode_time.observe(self._last_token[index] - self._first_token[index])
