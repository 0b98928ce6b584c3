# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer conform`: the HTTP contract as executable checks against any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from rocm_infer.tools.conform_chat import chat
from rocm_infer.tools.conform_completions import completions
from rocm_infer.tools.conform_errors import errors
from rocm_infer.tools.conform_info import info
from rocm_infer.tools.conform_stream import stream
from rocm_infer.tools.conform_structured import structured
from rocm_infer.tools.conform_target import Check, Failed, Target
from rocm_infer.tools.conform_tools import tools
from rocm_infer.tools.conform_translations import messages, responses

AREAS = (chat, stream, completions, structured, tools, messages, responses, info, errors)
CHECKS = tuple(check for area in AREAS for check in area.checks)
SECONDS_PER_CHECK = 120.0
CONCURRENCY = 12


@dataclass(frozen=True)
class Result:
    """How a check went; `problem`, `expected` and `got` are empty where it passed."""

    id: str
    says: str
    passed: bool
    seconds: float
    problem: str = ""
    expected: str = ""
    got: str = ""


def conform(
    base_url: str, *, model: str | None, api_key: str | None, only: str, json_path: Path | None, say: Callable[[str], None]
) -> int:
    """Runs the checks whose id matches the pattern `only`; returns 0 if all passed, else 1. Raises ValueError where none matches."""
    chosen = select(only)
    results = asyncio.run(run_checks(chosen, base_url, model=model, api_key=api_key))
    say(table(results))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.passed for result in results) else 1


def select(only: str) -> list[Check]:
    """The checks whose id matches a shell pattern; the name of an area means all of it."""
    chosen = [check for check in CHECKS if fnmatch.fnmatch(check.id, only) or check.id.startswith(only + ".")]
    if not chosen:
        areas = ", ".join(area.name for area in AREAS)
        raise ValueError(f"--only {only!r} matches no check; areas are {areas}, and * matches any text")
    return chosen


async def run_checks(checks: Sequence[Check], base_url: str, *, model: str | None, api_key: str | None) -> list[Result]:
    """Results in the order of `checks`. Raises OSError where there is no server."""
    timeout = aiohttp.ClientTimeout(total=SECONDS_PER_CHECK)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        base_url = base_url.rstrip("/").removesuffix("/v1")
        target = Target(session, base_url, model or await _first_model(session, base_url, api_key), api_key)
        gate = asyncio.Semaphore(CONCURRENCY)

        async def guarded(check: Check) -> Result:
            async with gate:
                return await _run(check, target)

        together = [check for check in checks if not check.alone]
        results = dict(zip(together, await asyncio.gather(*map(guarded, together)), strict=True))
        for check in checks:
            if check.alone:
                results[check] = await _run(check, target)
    return [results[check] for check in checks]


async def _first_model(session: aiohttp.ClientSession, base_url: str, api_key: str | None) -> str:
    reply = await Target(session, base_url, "", api_key).get("/v1/models")
    try:
        name: str = reply.body["data"][0]["id"]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{base_url}/v1/models names no model ({reply.status} {reply.text[:200]}); give --model") from error
    return name


async def _run(check: Check, target: Target) -> Result:
    began = time.perf_counter()
    problem = expected = got = ""
    try:
        await asyncio.wait_for(check.run(target), SECONDS_PER_CHECK)
    except Failed as failure:
        problem, expected, got = failure.what, failure.expected, failure.got
    except (TimeoutError, asyncio.TimeoutError):
        problem, expected, got = "the check", f"an end within {SECONDS_PER_CHECK:.0f} s", "none"
    except Exception as error:  # an answer of another shape breaks a check in any way
        problem, expected, got = "the answer", "the members that the check reads", f"{type(error).__name__}: {error}"[:300]
    return Result(check.id, check.says, not problem, round(time.perf_counter() - began, 3), problem, expected, got)


def table(results: Sequence[Result]) -> str:
    """A line per check, what failed with expected and got, and the counts."""
    width = max(len(result.id) for result in results)
    lines = []
    for result in results:
        lines.append(f"{'pass' if result.passed else 'FAIL'}  {result.id:{width}}  {result.says}")
        if not result.passed:
            indent = " " * (width + 8)
            lines += [f"{indent}{result.problem}:", f"{indent}  expected {result.expected}", f"{indent}  got      {result.got}"]
    counts = Counter(result.passed for result in results)
    return "\n".join([*lines, f"{counts[True]} passed, {counts[False]} failed"])
