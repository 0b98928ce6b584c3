# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics under our names and, value for value, under those that dashboards for vLLM and SGLang query."""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rocm_infer.engine.messages import STEP_TOKENS

OURS = "rocm_infer:"


class Alias(NamedTuple):
    """Another name of a metric, without what Prometheus appends, and the labels it has in addition."""

    name: str
    labels: Mapping[str, str] = {}


VLLM = {
    **{
        name: (Alias(f"vllm:{name}"),)
        for name in (
            *("num_requests_running", "num_requests_waiting", "num_preemptions", "prompt_tokens", "generation_tokens"),
            *("prefix_cache_queries", "prefix_cache_hits", "time_to_first_token_seconds", "e2e_request_latency_seconds"),
            *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
            *("request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
            *("request_max_num_generation_tokens", "request_params_max_tokens", "request_params_n", "request_success"),
            "iteration_tokens_total",
        )
    },
    "kv_cache_usage_ratio": (Alias("vllm:kv_cache_usage_perc"), Alias("vllm:gpu_cache_usage_perc")),
    "inter_token_latency_seconds": (Alias("vllm:inter_token_latency_seconds"), Alias("vllm:time_per_output_token_seconds")),
    "kv_cache": (Alias("vllm:cache_config"),),
}
SGLANG = {
    "num_requests_running": (Alias("sglang:num_running_reqs"),),
    "num_requests_waiting": (Alias("sglang:num_queue_reqs"),),
    "kv_cache_usage_ratio": (Alias("sglang:token_usage"),),
    "kv_cache_page_size": (Alias("sglang:page_size"),),
    "kv_cache_pages": (Alias("sglang:num_pages"),),
    "kv_cache_tokens": (Alias("sglang:max_total_num_tokens"),),
    "prefix_cache_hit_ratio": (Alias("sglang:cache_hit_rate"),),
    "prefix_cache_hits": (Alias("sglang:cached_tokens"),),
    "prompt_tokens": (Alias("sglang:prompt_tokens"),),
    "generation_tokens": (Alias("sglang:generation_tokens"),),
    "generation_throughput": (Alias("sglang:gen_throughput"),),
    "time_to_first_token_seconds": (Alias("sglang:time_to_first_token_seconds"),),
    "inter_token_latency_seconds": (Alias("sglang:inter_token_latency_seconds"),),
    "e2e_request_latency_seconds": (Alias("sglang:e2e_request_latency_seconds"),),
    "request_queue_time_seconds": (
        Alias("sglang:queue_time_seconds"),
        Alias("sglang:per_stage_req_latency_seconds", {"stage": "queue"}),
    ),
    "request_prefill_time_seconds": (Alias("sglang:per_stage_req_latency_seconds", {"stage": "prefill"}),),
    "request_decode_time_seconds": (Alias("sglang:per_stage_req_latency_seconds", {"stage": "decode"}),),
    "request_prompt_tokens": (Alias("sglang:prompt_tokens_histogram"),),
    "request_generation_tokens": (Alias("sglang:generation_tokens_histogram"),),
    "requests": (Alias("sglang:num_requests"),),
    "requests_aborted": (Alias("sglang:num_aborted_requests"),),
    "num_preemptions": (Alias("sglang:num_retracted_requests"),),
}
COMPAT = {"none": (), "vllm": (VLLM,), "sglang": (SGLANG,), "all": (VLLM, SGLANG)}

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
MIN_RATE_SECONDS = 1.0

# engine statistic -> (metric, help); gauges
ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Requests in the running batch"),
    "num_waiting": ("num_requests_waiting", "Requests waiting to be admitted"),
    "token_usage": ("kv_cache_usage_ratio", "Share of KV pages in use, 0 to 1"),
    "num_pages": ("kv_cache_pages", "Pages of the KV cache"),
    "page_size": ("kv_cache_page_size", "Tokens per page of the KV cache"),
    "max_total_tokens": ("kv_cache_tokens", "Tokens the KV cache holds"),
    "hit_ratio": ("prefix_cache_hit_ratio", "Share of prompt tokens found in the prefix cache, 0 to 1"),
    "throughput": ("generation_throughput", "Generated tokens per second between the last two readings"),
}
# engine statistic -> (metric, help); counters since the worker started
ENGINE_COUNTERS = {
    "preemptions": ("num_preemptions", "Requests whose pages were taken back and recomputed"),
    "prompt_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "cached_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "num_steps": ("engine_steps", "Forward passes"),
    "jit_compiles": ("jit_compiles", "Kernels that Triton compiled at run time; `rocm-infer compile` does it ahead"),
}


class _EngineCollector(Collector):
    """Families made from the engine's last statistics."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._values: Mapping[str, float] = {}
        self._last_count = (0.0, 0.0)  # when, and tokens generated until then
        self.info: Mapping[str, str] = {}
        self.startup_seconds: Mapping[str, float] = {}

    @property
    def values(self) -> Mapping[str, float]:
        """The engine's statistics and what follows from them."""
        return self._values

    def update(self, values: Mapping[str, float]) -> None:
        """New statistics of the engine. The throughput is that since the last ones, or since those a second ago."""
        then, count = self._last_count
        now, generated = time.monotonic(), values.get("generated_tokens", 0.0)
        rate = self._values.get("throughput", 0.0)
        if generated < count or now - then >= MIN_RATE_SECONDS:
            rate = max(0.0, generated - count) / (now - then) if then else 0.0
            self._last_count = now, generated
        ratio = values.get("cached_tokens", 0.0) / max(1.0, values.get("prompt_tokens", 0.0))
        self._values = {**values, "throughput": rate, "hit_ratio": ratio}

    def collect(self) -> Iterator[Metric]:
        names, labels = list(self._labels), list(self._labels.values())
        for key, (name, text) in ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(OURS + name, text, labels=names)
            gauge.add_metric(labels, self._values.get(key, 0.0))
            yield gauge
        for key, (name, text) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(OURS + name, text, labels=names)
            counter.add_metric(labels, self._values.get(key, 0.0))
            yield counter
        steps = HistogramMetricFamily(OURS + "iteration_tokens_total", "Tokens computed per forward pass", labels=names)
        counts = [self._values.get(f"step_tokens_{bound}", 0.0) for bound in (*STEP_TOKENS, "inf")]
        steps.add_metric(labels, _cumulative(STEP_TOKENS, counts), self._values.get("step_tokens", 0.0))
        yield steps
        info = InfoMetricFamily(OURS + "kv_cache", "Geometry of the KV cache", labels=names)
        info.add_metric(labels, dict(self.info))
        yield info
        startup = GaugeMetricFamily(OURS + "startup_seconds", "Start-up time by phase", labels=[*names, "phase"])
        for phase, seconds in self.startup_seconds.items():
            startup.add_metric([*labels, phase], seconds)
        yield startup


class _Histogram(Collector):
    """A histogram that is told of every token: one bisection each, where the library's walks its buckets and takes locks."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str], bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), _cumulative(self._bounds, self._counts), self._sum)
        yield family


def _cumulative(bounds: Iterable[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Prometheus counts in each bucket what is at most its bound; `counts` has one more, of what is beyond the last."""
    return list(zip([floatToGoString(bound) for bound in (*bounds, math.inf)], itertools.accumulate(counts)))


class _AllNames(Collector):
    """Everything in a registry, then what has other names under these. Creation times, which nobody asks for, are left out."""

    def __init__(self, registry: CollectorRegistry, tables: Iterable[Mapping[str, tuple[Alias, ...]]]) -> None:
        self._registry = registry
        self._tables = tuple(tables)

    def collect(self) -> Iterable[Metric]:
        families = list(self._registry.collect())
        for family in families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        aliases: dict[str, Metric] = {}
        for table in self._tables:
            for family in families:
                for alias in table.get(family.name.removeprefix(OURS), ()):
                    _add_alias(aliases, family, alias)
        return [*families, *aliases.values()]


def _add_alias(aliases: dict[str, Metric], family: Metric, alias: Alias) -> None:
    copy = aliases.setdefault(alias.name, Metric(alias.name, family.documentation, family.type))
    copy.samples += [
        sample._replace(name=alias.name + sample.name.removeprefix(family.name), labels={**sample.labels, **alias.labels})
        for sample in family.samples
    ]


class Metrics:
    """All metrics of one server. Cheap to update; rendered on demand."""

    def __init__(self, model_name: str, compat: str) -> None:
        """`compat`: a key of COMPAT, whose names are given beside ours."""
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._named = CollectorRegistry()
        self._named.register(_AllNames(self._registry, COMPAT[compat]))
        self.engine = _EngineCollector(self._labels)
        self._registry.register(self.engine)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self.first_token = self._histogram("time_to_first_token_seconds", "Until the first token", FIRST_TOKEN_BUCKETS)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between tokens", BETWEEN_TOKENS_BUCKETS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Whole request", REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Until the first step", REQUEST_BUCKETS)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Until the first token, without the queue", REQUEST_BUCKETS
        )
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "Whole request, without the queue", REQUEST_BUCKETS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token", REQUEST_BUCKETS)
        self.prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens per request", COUNT_BUCKETS)
        self.output_len = self._histogram("request_generation_tokens", "Generated tokens per output", COUNT_BUCKETS)
        self.longest_output = self._histogram(
            "request_max_num_generation_tokens", "Generated tokens of a request's longest output", COUNT_BUCKETS
        )
        self.max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for", COUNT_BUCKETS)
        self.num_outputs = self._histogram("request_params_n", "n asked for", N_BUCKETS)
        self._requests = self._counter("requests", "Outputs that ended")
        self._aborted = self._counter("requests_aborted", "Outputs that were aborted")
        self._finished = self._labelled_counter("request_success", "Outputs by how they ended", "finished_reason")
        self._responses = self._labelled_counter("http_responses", "HTTP responses by status", "status")
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(*self._labels.values(), reason)

    def _counter(self, name: str, text: str) -> Any:
        return Counter(OURS + name, text, list(self._labels), registry=self._registry).labels(*self._labels.values())

    def _labelled_counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(OURS + name, text, [*self._labels, label], registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> _Histogram:
        made = _Histogram(OURS + name, text, self._labels, bounds)
        self._registry.register(made)
        return made

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._labels.values(), reason).inc()
        self._requests.inc()
        if reason == "abort":
            self._aborted.inc()

    def responded(self, status: int) -> None:
        self._responses.labels(*self._labels.values(), str(status)).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._named)
