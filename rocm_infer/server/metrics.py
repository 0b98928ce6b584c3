# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics under our names and, value for value, under the names vLLM's dashboards and routers query."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

OURS, VLLM = "rocm_infer:", "vllm:"
RENAMED = {"kv_cache_usage_ratio": "kv_cache_usage_perc", "kv_cache": "cache_config"}

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

# engine statistic -> (metric, help); gauges
ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Requests in the running batch"),
    "num_waiting": ("num_requests_waiting", "Requests waiting to be admitted"),
    "token_usage": ("kv_cache_usage_ratio", "Share of KV pages in use, 0 to 1"),
}
# engine statistic -> (metric, help); counters since the worker started
ENGINE_COUNTERS = {
    "preemptions": ("num_preemptions", "Requests whose pages were taken back and recomputed"),
    "prompt_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "cached_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "num_steps": ("engine_steps", "Forward passes"),
}


class _EngineCollector(Collector):
    """Families made from the engine's last statistics."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self.values: Mapping[str, float] = {}
        self.info: Mapping[str, str] = {}
        self.startup_seconds: Mapping[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for key, (name, text) in ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(OURS + name, text, labels=names)
            gauge.add_metric(values, self.values.get(key, 0.0))
            yield gauge
        for key, (name, text) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(OURS + name, text, labels=names)
            counter.add_metric(values, self.values.get(key, 0.0))
            yield counter
        info = InfoMetricFamily(OURS + "kv_cache", "Geometry of the KV cache", labels=names)
        info.add_metric(values, dict(self.info))
        yield info
        startup = GaugeMetricFamily(OURS + "startup_seconds", "Start-up time by phase", labels=[*names, "phase"])
        for phase, seconds in self.startup_seconds.items():
            startup.add_metric([*values, phase], seconds)
        yield startup


class _BothNames(Collector):
    """Everything in a registry, then the same again under vLLM's names. Creation times, which nobody asks for, are left out."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        families = list(self._registry.collect())
        for family in families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        return [*families, *map(_alias, families)]


def _alias(family: Metric) -> Metric:
    stem = family.name.removeprefix(OURS)
    name = VLLM + RENAMED.get(stem, stem)
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [
        Sample(name + sample.name.removeprefix(family.name), sample.labels, sample.value, sample.timestamp, sample.exemplar)
        for sample in family.samples
    ]
    return copy


class Metrics:
    """All metrics of one server. Cheap to update; rendered on demand."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._both = CollectorRegistry()
        self._both.register(_BothNames(self._registry))
        self.engine = _EngineCollector(self._labels)
        self._registry.register(self.engine)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self.first_token = self._histogram("time_to_first_token_seconds", "Until the first token", FIRST_TOKEN_BUCKETS)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between tokens", BETWEEN_TOKENS_BUCKETS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Whole request", REQUEST_BUCKETS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token", REQUEST_BUCKETS)
        self.prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens per request", COUNT_BUCKETS)
        self.output_len = self._histogram("request_generation_tokens", "Generated tokens per output", COUNT_BUCKETS)
        self.max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for", COUNT_BUCKETS)
        self.num_outputs = self._histogram("request_params_n", "n asked for", N_BUCKETS)
        self._finished = self._labelled_counter("request_success", "Outputs by how they ended", "finished_reason")
        self._responses = self._labelled_counter("http_responses", "HTTP responses by status", "status")
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(*self._labels.values(), reason)

    def _counter(self, name: str, text: str) -> Any:
        return Counter(OURS + name, text, list(self._labels), registry=self._registry).labels(*self._labels.values())

    def _labelled_counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(OURS + name, text, [*self._labels, label], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(OURS + name, text, list(self._labels), buckets=buckets, registry=self._registry)
        return made.labels(*self._labels.values())

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._labels.values(), reason).inc()

    def responded(self, status: int) -> None:
        self._responses.labels(*self._labels.values(), str(status)).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._both)
