# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real browser: streaming, stop, parameters, tokens per second, errors, dark mode, keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.text.chat import ChatTemplate
from tests.server.browser import CHROMIUM, Page, browser
from tests.server.fakes import FakeClient, Harness, Script, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

ANSWER = "A first line,\nthen <b>markup</b> & wörld 😀."


def in_browser(
    scenario: Callable[[Harness, Page], Awaitable[None]],
    script: Script,
    *,
    dark: bool = False,
    may_complain: bool = False,
    **settings: Any,
) -> None:
    """Runs a scenario on the open page; anything the browser complains of fails it, unless it may."""

    async def main() -> None:
        async with serving(FakeClient(script), **settings) as server, browser(dark=dark) as page:
            await page.open(server.url + "/")
            await page.until("document.getElementById('served').textContent !== ''")
            await scenario(server, page)
            assert may_complain or page.problems == [], page.problems

    asyncio.run(asyncio.wait_for(main(), 200))


async def ask(page: Page, text: str) -> None:
    await page.value("document.getElementById('text').focus()")
    await page.command("Input.insertText", text=text)
    await page.press_enter()


LAST = "[...document.querySelectorAll('.assistant')].at(-1)"


def test_a_conversation() -> None:
    async def scenario(server: Harness, page: Page) -> None:
        assert await page.value("document.getElementById('served').textContent") == "toy, 256 tokens of context"
        await ask(page, "hello <i>you</i>")
        await page.until(f"{LAST}?.querySelector('.text')?.textContent.length > 3")
        assert await page.value(f"{LAST}.classList.contains('running')"), "the answer is shown while it grows"
        note = await page.until(f"{LAST}.querySelector('.note')?.textContent")
        assert await page.value(f"{LAST}.querySelector('.text').textContent") == ANSWER
        assert await page.value("document.querySelector('.user .text').textContent") == "hello <i>you</i>"
        assert await page.value("document.querySelectorAll('.turn b, .turn i').length") == 0
        assert "tokens/s" in note
        assert "first after" in note
        await page.value("document.getElementById('parameters').click()")
        for name, value in (("temperature", "0.5"), ("top_p", "0.9"), ("top_k", "4"), ("max_tokens", "5"), ("seed", "7")):
            await page.value(f"document.getElementById('{name}').value = '{value}'")
        await page.value("document.getElementById('system').value = 'be brief'")
        await ask(page, "again")
        note = await page.until(
            f"document.querySelectorAll('.assistant').length === 2 && {LAST}.querySelector('.note')?.textContent"
        )
        assert note.startswith("5 tokens")
        assert "cut at max_tokens" in note
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (0.5, 0.9, 4, 5, 7)
        prompt = server.service.tokenizer.decode(server.engine.requests[-1].prompt_ids, skip_special_tokens=False)
        assert all(part in prompt for part in ("be brief", "hello <i>you</i>", ANSWER, "again"))
        await page.value("document.getElementById('reset').click()")
        assert await page.value("document.querySelectorAll('.turn').length") == 0

    in_browser(scenario, Script(text=ANSWER, delay=0.02))


def test_stop() -> None:
    async def scenario(server: Harness, page: Page) -> None:
        await ask(page, "go")
        await page.until(f"{LAST}?.querySelector('.text')?.textContent.length > 2")
        assert await page.value("document.getElementById('send').hidden")
        await page.value("document.getElementById('stop').click()")
        assert await page.until(f"{LAST}.querySelector('.note')?.textContent") == "stopped"
        await page.until("document.getElementById('stop').hidden")
        for _ in range(100):
            if server.engine.aborted:
                break
            await asyncio.sleep(0.05)
        assert len(server.engine.aborted) == 1, "the server stops as well"
        shown = await page.value(f"{LAST}.querySelector('.text').textContent")
        assert 0 < len(shown) < 60

    in_browser(scenario, Script(text="a very long answer " * 12, delay=0.05))


def test_thinking_is_folded_away() -> None:
    async def scenario(server: Harness, page: Page) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate("{{ messages[0].content }}{# </think> #}", {}))
        await ask(page, "go")
        await page.until(f"{LAST}?.querySelector('.note') != null")
        assert await page.value(f"{LAST}.querySelector('.thought div').textContent") == "why"
        assert await page.value(f"{LAST}.querySelector('.thought').open") is False
        assert await page.value(f"{LAST}.querySelector('.text').textContent") == "Yes."

    in_browser(scenario, Script(text="<think>\nwhy\n</think>\n\nYes."))


def test_an_error_is_shown() -> None:
    async def scenario(server: Harness, page: Page) -> None:
        await ask(page, "go")
        note = await page.until(f"{LAST}.querySelector('.note.error')?.textContent")
        assert "the step failed" in note

    in_browser(scenario, Script(error=ErrorInfo("internal_error", "the step failed"), fail_after=3))


def test_a_key_is_asked_for_and_dark_mode_follows_the_system() -> None:
    async def scenario(server: Harness, page: Page) -> None:
        assert "API key" in await page.value("document.getElementById('served').textContent")
        await page.value("(key => { key.value = 'k1'; key.onchange(); })(document.getElementById('key'))")
        await page.until("document.getElementById('model').options.length === 1")
        await ask(page, "hi")
        await page.until(f"{LAST}?.querySelector('.note') != null")
        assert await page.value(f"{LAST}.querySelector('.text').textContent") == ANSWER
        assert await page.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 18, 16)"
        await page.value("document.getElementById('theme').click()")
        assert await page.value("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"

    in_browser(scenario, Script(text=ANSWER), dark=True, may_complain=True, api_key=("k1",))
