# SPDX-License-Identifier: Apache-2.0
"""Every setting of the package: frozen, validated dataclasses. The command line is generated from `EngineConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_CACHE_DTYPES = ("auto", "fp8_e4m3")
KERNEL_BACKENDS = ("auto", "reference", "triton", "hip")
EMBEDDED_MODEL = "tiny-deepseek"
TOOL_CALL_PARSERS = (
    *("auto", "hermes", "qwen3_coder", "llama3_json", "mistral", "mistral_args", "deepseek_v3", "deepseek_v31"),
)
MAX_LOGPROBS = 20
MAX_STOPS = 16


class ConfigError(ValueError):
    """A setting is outside its range. `param` names the field, for HTTP errors and command-line messages."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _flag(default: Any, text: str, *, names: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with what the command line needs: help text, extra spellings, allowed values."""
    return field(default=default, metadata={"help": text, "names": names, "choices": choices})


def _require(condition: bool, param: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(param, f"{param}: expected {expected}, got {got!r}")


def _require_choices(config: Any) -> None:
    """Every field that has choices holds one of them."""
    for item in dataclasses.fields(config):
        choices, value = item.metadata.get("choices"), getattr(config, item.name)
        _require(not choices or value in choices, item.name, f"one of {', '.join(choices or ())}", value)


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. Sizes are in tokens unless the name says otherwise."""

    model: str = _flag(EMBEDDED_MODEL, "model directory, hub id, or the embedded tiny-deepseek", names=("--model-path",))
    tokenizer: str | None = _flag(None, "tokenizer directory, default: the model's", names=("--tokenizer-path",))
    device: str = _flag("auto", "auto, cpu, cuda (AMD GPUs answer to this name in torch), emulated:gfx942, emulated:gfx950")
    dtype: str = _flag("auto", "activation and weight type", choices=DTYPES)
    kv_cache_dtype: str = _flag("auto", "type of cached keys and values", choices=KV_CACHE_DTYPES)
    kernel_backend: str = _flag(
        "auto", "kernels to use; an explicit one wins or refuses with its reason", choices=KERNEL_BACKENDS
    )
    kernel_bundle: str | None = _flag(None, "folder of kernels compiled ahead by `rocm-infer compile`")
    load_format: str = _flag("safetensors", "'dummy' makes seeded random weights", choices=("safetensors", "dummy"))
    context_length: int | None = _flag(None, "longest prompt plus output, default: the model's")
    page_size: int = _flag(16, "tokens per KV page")
    max_running_requests: int = _flag(256, "requests decoded together at most")
    max_queued_requests: int = _flag(4096, "requests waiting at most; beyond that 429")
    max_total_tokens: int | None = _flag(None, "tokens the KV cache holds, default: from the memory plan")
    mem_fraction_static: float | None = _flag(None, "share of memory for weights and KV cache together")
    chunked_prefill_size: int = _flag(2048, "prompt tokens in one step at most")
    disable_radix_cache: bool = _flag(False, "do not reuse the pages of shared prefixes")
    schedule_conservativeness: float = _flag(1.0, "share of a request's maximal output reserved at admission, 0 to 1")
    tensor_parallel_size: int = _flag(1, "GPUs that share one model", names=("--tp", "--tp-size"))
    random_seed: int = _flag(0, "seed of requests that bring none")
    num_threads: int | None = _flag(None, "CPU threads, default: the cores this process may use")
    trust_remote_code: bool = _flag(False, "accepted for compatibility; code from checkpoints is never run")
    step_timeout: float = _flag(300.0, "seconds after which a step counts as hung")

    def __post_init__(self) -> None:
        positive = (
            "page_size max_running_requests max_queued_requests chunked_prefill_size tensor_parallel_size context_length "
            "max_total_tokens num_threads step_timeout"
        )
        for name in positive.split():
            value = getattr(self, name)
            _require(value is None or value > 0, name, "a positive number", value)
        _require_choices(self)
        share = self.mem_fraction_static
        _require(share is None or 0 < share <= 1, "mem_fraction_static", "a share in (0, 1]", share)
        _require(
            0 <= self.schedule_conservativeness <= 1,
            "schedule_conservativeness",
            "a share in [0, 1]",
            self.schedule_conservativeness,
        )


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP front."""

    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(30000, "port to listen on")
    served_model_name: tuple[str, ...] = _flag((), "names clients may use, default: the model as given")
    chat_template: str | None = _flag(None, "jinja file instead of the checkpoint's template")
    tool_call_parser: str = _flag(
        "auto", "how the model writes tool calls, default: as its chat template tells", choices=TOOL_CALL_PARSERS
    )
    generation_config: str = _flag("auto", "'none' ignores the checkpoint's generation_config.json", choices=("auto", "none"))
    api_key: tuple[str, ...] = _flag((), "accepted bearer tokens; none: no check")
    log_level: str = _flag("info", "verbosity", choices=("debug", "info", "warning", "error"))
    log_format: str = _flag("text", "log lines as text or JSON", choices=("text", "json"))
    log_requests: str = _flag(
        "none",
        "a line when a request ends: its tokens and times, also its parameters, also what was asked and answered",
        choices=("none", "metadata", "params", "content"),
    )
    metrics_compat: str = _flag("all", "whose names /metrics uses beside ours", choices=("all", "vllm", "sglang", "none"))
    profile_dir: str | None = _flag(
        None, "folder for traces of /start_profile, default: rocm_infer/profiles in $XDG_STATE_HOME or ~/.local/state"
    )
    skip_server_warmup: bool = _flag(False, "do not run a request before announcing readiness")
    drain_timeout: float = _flag(30.0, "seconds that running requests get after SIGTERM")
    request_timeout: float = _flag(0.0, "seconds after which a request ends with the error 'timeout', 0: never")
    max_crashes: int = _flag(3, "engine crashes within a minute that end the server")
    capsule_dir: str | None = _flag(
        None,
        "folder for what a crashed engine leaves, default: rocm_infer/capsules in $XDG_STATE_HOME or ~/.local/state; 'none': nothing",
    )
    capsule_token_ids: bool = _flag(False, "record token ids for `rocm-infer replay`; they hold what users wrote")
    max_body_size: int = _flag(16 << 20, "largest request body in bytes")
    strict_params: bool = _flag(False, "refuse unknown request fields instead of ignoring them")

    def __post_init__(self) -> None:
        _require_choices(self)
        _require(0 <= self.port < 65536, "port", "0 to 65535", self.port)
        _require(self.drain_timeout >= 0, "drain_timeout", "seconds >= 0", self.drain_timeout)
        _require(self.request_timeout >= 0, "request_timeout", "seconds >= 0", self.request_timeout)
        _require(self.max_crashes > 0, "max_crashes", "a positive number", self.max_crashes)


@dataclass(frozen=True)
class Grammar:
    """What an output must look like: XGrammar's structural tag format as JSON text, and the request field it came from."""

    text: str
    param: str = "grammar"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Defaults are the neutral values; `max_tokens=None` means the rest of the context.

    `stop` holds strings (text layer), `stop_token_ids` ids (engine). `logprobs` is the number of alternatives reported
    beside the sampled token, None for no log-probabilities at all. `top_k=0` means the whole vocabulary. With a `grammar` the
    output ends where the grammar ends, whatever `ignore_eos` and `min_tokens` say.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "an integer >= 0", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "an integer >= 0", self.min_tokens)
        _require(0 <= self.temperature <= 2, "temperature", "a number from 0 to 2", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", "an integer >= 0 (0: all)", self.top_k)
        _require(0 <= self.min_p <= 1, "min_p", "a number from 0 to 1", self.min_p)
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", "a number from -2 to 2", self.presence_penalty)
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "a number from -2 to 2", self.frequency_penalty)
        _require(0 < self.repetition_penalty <= 10, "repetition_penalty", "a number in (0, 10]", self.repetition_penalty)
        _require(
            all(-100 <= bias <= 100 for _, bias in self.logit_bias),
            "logit_bias",
            "values from -100 to 100",
            self.logit_bias,
        )
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)
        _require(1 <= self.n <= 128, "n", "an integer from 1 to 128", self.n)
        _require(len(self.stop) <= MAX_STOPS and all(self.stop), "stop", f"at most {MAX_STOPS} non-empty strings", self.stop)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}", value)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `kind` is none, linear, llama3 or yarn; factors as in the HF `rope_scaling` block."""

    theta: float
    width: int
    interleaved: bool = False
    kind: str = "none"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in one layer."""

    num_experts: int
    top_k: int
    intermediate: int
    num_shared: int = 0
    shared_intermediate: int = 0
    num_groups: int = 1
    top_groups: int = 1
    score: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    has_bias: bool = False


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2/V3). `q_lora_rank` None: queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint's config.json means to us; families translate it. Head sizes in elements."""

    architecture: str
    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    rms_eps: float
    rope: RopeConfig
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    windowed_layers: tuple[int, ...] = ()
    moe: MoeConfig | None = None
    moe_layers: tuple[int, ...] = ()
    mla: MlaConfig | None = None
    softmax_scale: float = 0.0
    fp8_block: tuple[int, int] | None = None
    unquantised: tuple[str, ...] = ()
    num_mtp_layers: int = 0
    dtype: str = "bfloat16"
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
