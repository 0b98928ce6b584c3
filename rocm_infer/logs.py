# SPDX-License-Identifier: Apache-2.0
"""Log lines as text or JSON, the same for the server and its worker."""

from __future__ import annotations

import json
import logging
import sys

OTHERS = ("aiohttp", "asyncio")  # libraries whose warnings come in the same form


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `fields` given to a log call become members."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def handler_of(form: str) -> logging.Handler:
    """A handler that writes to stderr; `form` is text or json."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    return handler


def set_up_logging(level: str, form: str) -> None:
    """Everything of this package, and the warnings of the libraries that serve it, to stderr."""
    handler = handler_of(form)
    for name in ("rocm_infer", *OTHERS):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.WARNING if name in OTHERS else level.upper())
        logger.propagate = False
