# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-port=0"
START_SECONDS = 60


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.problems: list[str] = []

    async def command(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            level = message.get("params", {}).get("entry", {}).get("level")
            if message.get("method") == "Runtime.exceptionThrown" or level in ("warning", "error"):
                self.problems.append(str(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.command(f"{domain}.enable")
        await self.command("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON data."""
        reply = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> Any:
        """Waits until an expression is true."""
        for _ in range(int(seconds / 0.05)):
            found = await self.value(f"document.readyState === 'complete' && ({expression})")
            if found:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {expression}; the page says {await self.value('document.body.innerText')!r}")

    async def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.command("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    async def screenshot(self) -> bytes:
        """A PNG of what is in view."""
        return base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def browser(*, width: int = 1000, height: int = 720, dark: bool = False) -> AsyncIterator[Page]:
    """A new browser with one empty tab."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *(CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            port = await asyncio.wait_for(_port(process), START_SECONDS)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    url = next(tab["webSocketDebuggerUrl"] for tab in await response.json() if tab["type"] == "page")
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    page = Page(socket)
                    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                    await page.command("Emulation.setEmulatedMedia", features=[scheme])
                    await page.command(
                        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                    )
                    yield page
        finally:
            process.kill()
            await process.wait()


async def _port(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    async for line in process.stderr:
        found = re.search(rb"DevTools listening on ws://[^:]+:(\d+)/", line)
        if found:
            return found[1].decode()
    raise AssertionError(f"{CHROMIUM} ended before it listened")
