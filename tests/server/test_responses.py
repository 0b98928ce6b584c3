# SPDX-License-Identifier: Apache-2.0
"""/v1/responses as the official client reads it, over a scripted engine."""

from __future__ import annotations

import openai
import pytest

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.text.chat import ChatTemplate
from tests.server.fakes import MODEL, TOKENIZER, FakeClient, Harness, Script, run


def test_a_response() -> None:
    async def scenario(server: Harness) -> None:
        made = await server.sdk.responses.create(model=MODEL, input="hi", instructions="be brief", temperature=0)
        assert made.output_text == Script().text
        assert (made.status, made.object, made.error, made.temperature) == ("completed", "response", None, 0)
        assert made.id.startswith("resp_")
        assert made.usage is not None
        request = server.engine.requests[0]
        assert made.usage.input_tokens == len(request.prompt_ids)
        assert made.usage.output_tokens == len(TOKENIZER.encode(Script().text)) + 1
        assert request.params.temperature == 0
        await server.sdk.responses.create(
            model=MODEL,
            input=[
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            ],
        )
        assert server.engine.requests[1].prompt_ids == request.prompt_ids

    run(scenario)


def test_a_limit_makes_it_incomplete() -> None:
    async def scenario(server: Harness) -> None:
        made = await server.sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2)
        assert made.status == "incomplete"
        assert made.incomplete_details is not None
        assert made.incomplete_details.reason == "max_output_tokens"
        stream = await server.sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2, stream=True)
        assert [event.type async for event in stream][-1] == "response.incomplete"

    run(scenario)


def test_a_stream() -> None:
    async def scenario(server: Harness) -> None:
        kinds = []
        async with server.sdk.responses.stream(model=MODEL, input="hi") as stream:
            numbers = []
            text = ""
            async for event in stream:
                kinds.append(event.type)
                numbers.append(event.sequence_number)
                if event.type == "response.output_text.delta":
                    text += event.delta
            final = await stream.get_final_response()
        assert final.output_text == text == Script().text
        assert final.status == "completed"
        assert numbers == sorted(numbers)
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]

    run(scenario)


def test_what_is_refused() -> None:
    async def scenario(server: Harness) -> None:
        for fields, param in (
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
            ({"input": []}, "input"),
            ({"tools": [{"type": "web_search"}]}, "tools[0]"),
            ({"max_output_tokens": 100_000}, "max_output_tokens"),
            ({"background": True}, "background"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await server.sdk.responses.create(**{"model": MODEL, "input": "hi", **fields})  # type: ignore[call-overload]
            assert caught.value.param == param, caught.value

    run(scenario)


def test_a_failure_in_a_stream_raises_in_the_client() -> None:
    async def scenario(server: Harness) -> None:
        stream = await server.sdk.responses.create(model=MODEL, input="hi", stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            async for _ in stream:
                pass

    run(scenario, FakeClient(Script(error=ErrorInfo("internal_error", "broken"), fail_after=3)))


def test_thinking_is_an_item_of_its_own() -> None:
    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate("{{ messages[0].content }}{# </think> #}", {}))
        made = await server.sdk.responses.create(model=MODEL, input="hi")
        assert [item.type for item in made.output] == ["reasoning", "message"]
        assert made.output_text == "Yes."
        assert made.usage is not None
        assert made.usage.output_tokens_details.reasoning_tokens > 0
        async with server.sdk.responses.stream(model=MODEL, input="hi") as stream:
            thought = "".join([event.delta async for event in stream if event.type == "response.reasoning_text.delta"])
            final = await stream.get_final_response()
        assert thought == "why"
        assert final.output_text == "Yes."

    run(scenario, FakeClient(Script(text="<think>\nwhy\n</think>\n\nYes.")))
