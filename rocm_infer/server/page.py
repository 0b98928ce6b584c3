# SPDX-License-Identifier: Apache-2.0
"""The chat page: one static file, no build step, nothing loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

PAGE = Path(__file__).parent / "static" / "index.html"
# The page's own script and style, and requests to this server: nothing else.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def chat_page(request: web.Request) -> web.FileResponse:
    return web.FileResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
