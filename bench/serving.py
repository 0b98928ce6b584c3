# SPDX-License-Identifier: Apache-2.0
"""Load on a running server: throughput and latency, with the options and metric names that SGLang's users know.

python -m bench.serving --backend rocm-infer --dataset-name random --num-prompts 4000 --random-input 128 --random-output 128
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.clients import CLIENTS, DEFAULT_PORTS, Client, Prompt, Result, Sampling, open_session
from rocm_infer.config import EMBEDDED_MODEL
from rocm_infer.hub import resolve_model

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
PASSAGE = (
    "The wind had fallen before dawn, and the harbour lay so still that every mast stood twice, once in the air and once in "
    "the water. A woman counted crates along the quay; a boy read her the numbers from a torn ledger, and where a page was "
    "missing they opened the crate and counted what was inside. By noon they had found three mistakes, two of them old. "
    "Nobody was surprised. Whoever keeps books for long enough learns that the ledger and the harbour never quite agree, "
    "and that the useful question is not which of them is wrong, but since when. "
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--backend", choices=sorted(CLIENTS), default="rocm-infer", help="which server and API")
    add("--base-url", help="instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, help="default: 30000, vllm 8000")
    add("--ready-check-timeout-sec", type=float, default=60)
    add("--dataset-name", choices=("random", "random-ids", "sharegpt", "custom"), default="random")
    add(
        "--dataset-path",
        help="sharegpt: its JSON file; custom: JSON lines with prompt and output_len; random: source of the text",
    )
    add("--model", help="default: the first of /v1/models")
    add("--served-model-name", help="name sent in requests, default: --model")
    add("--tokenizer", help="directory with tokenizer.json, default: what the server reports")
    add("--num-prompts", type=int, default=1000)
    add("--random-input-len", type=int, default=1024, help="longest prompt in tokens")
    add("--random-output-len", type=int, default=1024, help="longest output in tokens")
    add("--random-range-ratio", type=float, default=0.0, help="shortest length as a share of the longest")
    add("--request-rate", type=float, default=float("inf"), help="requests per second (Poisson), default: all at once")
    add("--max-concurrency", type=int, help="requests in flight at most")
    add("--output-file", help="default: {backend}_{MMDD}_{num_prompts}_{in}_{out}.jsonl")
    add("--output-details", action="store_true", help="lengths, times, texts and errors of every request too")
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help=f"service levels, of {', '.join(GOODPUT_METRICS)}")
    add("--disable-tqdm", action="store_true")
    add("--disable-stream", action="store_true")
    add("--disable-ignore-eos", action="store_true")
    add("--return-logprob", action="store_true")
    add("--seed", type=int, default=42)
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--extra-request-body", type=json.loads, default={}, metavar="JSON")
    add("--flush-cache", action="store_true", help="empty the prefix cache after the warm-up")
    add("--warmup-requests", type=int, default=1)
    add("--tokenize-prompt", action="store_true", help="send token ids instead of text")
    add("--header", nargs="+", default=[], metavar="NAME=VALUE")
    add("--tag", help="stored with the result")
    args = parser.parse_args(argv)
    args.base_url = args.base_url or f"http://{args.host}:{args.port or DEFAULT_PORTS.get(args.backend, 30000)}"
    return args


def draw_lens(longest: int, ratio: float, count: int, generator: random.Random) -> list[int]:
    """Uniform integers from max(int(longest * ratio), 1) to longest."""
    return [generator.randint(max(int(longest * ratio), 1), longest) for _ in range(count)]


def random_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Prompts of drawn lengths: from a text (`random`) or from the vocabulary (`random-ids`)."""
    generator = random.Random(args.seed)
    input_lens = draw_lens(args.random_input_len, args.random_range_ratio, args.num_prompts, generator)
    output_lens = draw_lens(args.random_output_len, args.random_range_ratio, args.num_prompts, generator)
    vocab = tokenizer.get_vocab_size(with_added_tokens=False)
    source = Path(args.dataset_path).read_text() if args.dataset_path else PASSAGE
    ids = tokenizer.encode(source, add_special_tokens=False).ids
    prompts = []
    for index, (length, output_len) in enumerate(zip(input_lens, output_lens)):
        start = generator.randrange(vocab if args.dataset_name == "random-ids" else len(ids))
        if args.dataset_name == "random-ids":
            chosen = [(start + index + j) % vocab for j in range(length)]
        else:
            chosen = [ids[(start + j) % len(ids)] for j in range(length)]
        as_ids = args.tokenize_prompt or args.dataset_name == "random-ids"
        prompts.append(Prompt(chosen if as_ids else tokenizer.decode(chosen), length, output_len))
    return prompts


def file_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """ShareGPT conversations (first question, length of the first answer) or our own JSON lines."""
    if not args.dataset_path:
        raise SystemExit(f"--dataset-name {args.dataset_name} needs --dataset-path; 'random' needs no file")
    text = Path(args.dataset_path).read_text()
    if args.dataset_name == "custom":
        pairs = [(row["prompt"], int(row["output_len"])) for row in map(json.loads, text.splitlines())]
    else:
        talks = [row["conversations"] for row in json.loads(text) if len(row.get("conversations", [])) >= 2]
        pairs = [(talk[0]["value"], len(tokenizer.encode(talk[1]["value"]).ids)) for talk in talks]
    random.Random(args.seed).shuffle(pairs)
    prompts = []
    for prompt, output_len in pairs[: args.num_prompts]:
        ids = tokenizer.encode(prompt).ids
        prompts.append(Prompt(ids if args.tokenize_prompt else prompt, len(ids), output_len))
    return prompts


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as response:
        response.raise_for_status()
        return dict(await response.json())


async def wait_until_ready(session: aiohttp.ClientSession, base_url: str, timeout_s: float) -> str:
    """Poll /v1/models and, as ours and others listen while they load, /health; returns the first model's name."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            name = str((await get_json(session, base_url + "/v1/models"))["data"][0]["id"])
            async with session.get(base_url + "/health") as response:
                if response.status != 503:
                    return name
                raise LookupError("it is still loading, or not healthy")
        except (aiohttp.ClientError, OSError, LookupError) as error:
            if time.monotonic() > end:
                raise SystemExit(
                    f"no server answered at {base_url} within {timeout_s:g} s ({error}); start one first"
                ) from None
            await asyncio.sleep(0.5)


async def find_tokenizer(session: aiohttp.ClientSession, args: argparse.Namespace) -> Tokenizer:
    path = args.tokenizer
    if path is None:
        try:
            path = (await get_json(session, args.base_url + "/model_info"))["tokenizer_path"]
        except (aiohttp.ClientError, LookupError):
            path = args.model
    directory = resolve_model(path) if path == EMBEDDED_MODEL else Path(path or "")
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise SystemExit(f"no tokenizer.json at {path!r}; name its directory with --tokenizer")
    return Tokenizer.from_file(str(file))


async def send_all(
    session: aiohttp.ClientSession, client: Client, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> list[Result]:
    """Start requests at the asked rate, at most `max_concurrency` in flight."""
    gate = asyncio.Semaphore(args.max_concurrency or len(prompts) or 1)
    generator = random.Random(args.seed)

    async def one(prompt: Prompt) -> Result:
        async with gate:
            result = await client(session, args.base_url, prompt, sampling)
        bar.update()
        return result

    with tqdm(total=len(prompts), disable=args.disable_tqdm) as bar:
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(one(prompt)))
            if args.request_rate != float("inf"):
                await asyncio.sleep(generator.expovariate(args.request_rate))
        return list(await asyncio.gather(*tasks))


def describe(name: str, seconds: list[float]) -> dict[str, float]:
    """Mean, median, std and percentiles in milliseconds."""
    values = sorted(1e3 * value for value in seconds) or [0.0]

    def percentile(share: float) -> float:
        place = share * (len(values) - 1)
        low = int(place)
        return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])

    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": percentile(0.5),
        f"std_{name}_ms": statistics.pstdev(values),
        f"p90_{name}_ms": percentile(0.90),
        f"p95_{name}_ms": percentile(0.95),
        f"p99_{name}_ms": percentile(0.99),
        f"max_{name}_ms": values[-1],
    }


def peaks(results: list[Result]) -> tuple[float, int]:
    """(most output tokens in one second, most requests in flight in one second), from buckets of 1 s."""
    tokens: Counter[int] = Counter()
    flying: Counter[int] = Counter()
    begin = min((result.start for result in results), default=0.0)
    for result in results:
        moment = result.start - begin + result.ttft
        tokens[int(moment)] += 1
        for gap in result.itls:
            moment += gap
            tokens[int(moment)] += 1
        for second in range(int(result.start - begin), int(result.start - begin + result.latency) + 1):
            flying[second] += 1
    return float(max(tokens.values(), default=0)), max(flying.values(), default=0)


def tpot(result: Result) -> float:
    return (result.latency - result.ttft) / (result.output_len - 1)


def good(result: Result, levels: dict[str, float]) -> bool:
    """Whether a request met every service level (in ms)."""
    seen = {"ttft": result.ttft, "e2el": result.latency, "tpot": tpot(result) if result.output_len > 1 else 0.0}
    return result.success and all(1e3 * seen[name] <= limit for name, limit in levels.items())


def summarise(
    results: list[Result], duration: float, count_tokens: Callable[[str], int], levels: dict[str, float]
) -> dict[str, Any]:
    """All metrics of a run, in the definitions of SGLang's serving benchmark."""
    done = [result for result in results if result.success]
    total_in = sum(result.prompt.input_len for result in done)
    total_out = sum(result.output_len for result in done)
    peak_tokens, peak_requests = peaks(done)
    summary = {
        "duration": duration,
        "completed": len(done),
        "failed": len(results) - len(done),
        "total_input_tokens": total_in,
        "total_input_text_tokens": total_in,
        "total_output_tokens": total_out,
        "total_output_tokens_retokenized": sum(count_tokens(result.text) for result in done),
        "total_cached_tokens": sum(result.cached_len for result in done),
        "request_throughput": len(done) / duration,
        "input_throughput": total_in / duration,
        "output_throughput": total_out / duration,
        "max_output_tokens_per_s": peak_tokens,
        "total_throughput": (total_in + total_out) / duration,
        "max_concurrent_requests": peak_requests,
        "concurrency": sum(result.latency for result in done) / duration,
        **describe("e2e_latency", [result.latency for result in done]),
        **describe("ttft", [result.ttft for result in done]),
        **describe("tpot", [tpot(result) for result in done if result.output_len > 1]),
        **describe("itl", [gap for result in done for gap in result.itls]),
    }
    if levels:
        met = sum(good(result, levels) for result in results)
        summary.update(goodput=met / duration, goodput_attainment=met / max(len(results), 1))
    return summary


def table(args: argparse.Namespace, summary: dict[str, Any]) -> str:
    """The result as SGLang prints it: labels padded to 40, values to 10, between rules of 50."""

    def row(label: str, value: Any) -> str:
        return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value!s:<10}"

    lines = [
        f"{' Serving Benchmark Result ':=^50}",
        row("Backend:", args.backend),
        row("Traffic request rate:", args.request_rate),
        row("Max request concurrency:", args.max_concurrency or "not set"),
        row("Successful requests:", summary["completed"]),
        row("Failed requests:", summary["failed"]),
        row("Benchmark duration (s):", summary["duration"]),
        row("Total input tokens:", summary["total_input_tokens"]),
        row("Total input text tokens:", summary["total_input_text_tokens"]),
        row("Total generated tokens:", summary["total_output_tokens"]),
        row("Total generated tokens (retokenized):", summary["total_output_tokens_retokenized"]),
        row("Request throughput (req/s):", summary["request_throughput"]),
        row("Input token throughput (tok/s):", summary["input_throughput"]),
        row("Output token throughput (tok/s):", summary["output_throughput"]),
        row("Peak output token throughput (tok/s):", summary["max_output_tokens_per_s"]),
        row("Peak concurrent requests:", summary["max_concurrent_requests"]),
        row("Total token throughput (tok/s):", summary["total_throughput"]),
        row("Concurrency:", summary["concurrency"]),
    ]
    if "goodput" in summary:
        lines += [row("Goodput (req/s):", summary["goodput"]), row("Goodput attainment:", summary["goodput_attainment"])]
    sections = (
        ("End-to-End Latency", "e2e_latency", "E2E Latency"),
        ("Time to First Token", "ttft", "TTFT"),
        ("Time per Output Token (excl. 1st token)", "tpot", "TPOT"),
        ("Inter-Token Latency", "itl", "ITL"),
    )
    for title, name, short in sections:
        lines.append(f"{title:-^50}")
        for statistic in ("mean", "median", "p90", "p95", "p99", *(("max",) if name == "itl" else ())):
            label = statistic.capitalize() if not statistic.startswith("p") else statistic.upper()
            lines.append(row(f"{label} {short} (ms):", summary[f"{statistic}_{name}_ms"]))
    return "\n".join([*lines, "=" * 50])


def store(args: argparse.Namespace, summary: dict[str, Any], results: list[Result], server_info: dict[str, Any]) -> Path:
    """Append one JSON line; returns the file."""
    name = f"{args.backend}_{datetime.now():%m%d}_{args.num_prompts}_{args.random_input_len}_{args.random_output_len}.jsonl"
    path = Path(args.output_file or name)
    settings = "tag backend dataset_name request_rate max_concurrency num_prompts random_input_len random_output_len random_range_ratio seed"
    line = {key: getattr(args, key) for key in settings.split()} | {"server_info": server_info} | summary
    line["request_rate"] = "inf" if args.request_rate == float("inf") else args.request_rate
    if args.output_details:
        line.update(
            input_lens=[result.prompt.input_len for result in results],
            output_lens=[result.output_len for result in results],
            ttfts=[result.ttft for result in results],
            itls=[result.itls for result in results],
            generated_texts=[result.text for result in results],
            errors=[result.error for result in results],
        )
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path


def parse_levels(items: list[str]) -> dict[str, float]:
    levels = {}
    for item in items:
        name, _, limit = item.partition(":")
        if name not in GOODPUT_METRICS or not limit:
            raise SystemExit(f"--goodput: expected METRIC:MS with METRIC of {', '.join(GOODPUT_METRICS)}, got {item!r}")
        levels[name] = float(limit)
    return levels


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, measure, print, store; returns the summary."""
    client = CLIENTS[args.backend]
    levels = parse_levels(args.goodput)
    async with open_session(dict(item.split("=", 1) for item in args.header)) as session:
        served = await wait_until_ready(session, args.base_url, args.ready_check_timeout_sec)
        args.model = args.model or served
        tokenizer = await find_tokenizer(session, args)
        build = random_prompts if args.dataset_name.startswith("random") else file_prompts
        prompts = build(args, tokenizer)
        if not prompts:
            raise SystemExit("no prompts: expected --num-prompts >= 1 and a data set that is not empty")
        sampling = Sampling(
            model=args.served_model_name or args.model,
            temperature=args.temperature,
            top_p=args.top_p,
            ignore_eos=not args.disable_ignore_eos,
            stream=not args.disable_stream,
            return_logprob=args.return_logprob,
            extra=args.extra_request_body,
        )
        first = Prompt(prompts[0].text, prompts[0].input_len, min(prompts[0].output_len, 32))
        for result in await asyncio.gather(
            *(client(session, args.base_url, first, sampling) for _ in range(args.warmup_requests))
        ):
            if not result.success:
                raise SystemExit(f"the warm-up request failed: {result.error}")
        if args.flush_cache:
            async with session.post(args.base_url + "/flush_cache") as response:
                response.raise_for_status()
        start = time.perf_counter()
        results = await send_all(session, client, prompts, sampling, args)
        try:
            server_info = await get_json(session, args.base_url + "/server_info")
        except aiohttp.ClientError:
            server_info = {}
        duration = time.perf_counter() - start
    summary = summarise(results, duration, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), levels)
    print(table(args, summary))
    for error, count in Counter(result.error for result in results if not result.success).most_common(5):
        print(f"{count} failed: {error}", file=sys.stderr)
    print(f"written to {store(args, summary, results, server_info)}")
    return summary


def main(argv: list[str] | None = None) -> int:
    return 1 if asyncio.run(run(parse_args(argv)))["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
