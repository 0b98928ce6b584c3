# SPDX-License-Identifier: Apache-2.0
"""What makes a function an op: a signature line with named sizes, checks made from it, and dispatch to a backend.

    @op("x[T, C]:bf16|f16|f32, weight[C]:x -> y[T, C]:x", inputs=..., cost=...)
    def rms_norm(x, weight, *, eps): ...        # the body is the reference

Signature grammar, one item per tensor argument in order, then `->` and the outputs:
    name?![dims]:types      `?` may be None, `!` is written in place
    dims                    names bound at first use, integers, or expressions of bound names: `2*I`, `ceil(C/group)`
    types                   `bf16|f16` alternatives, `fp8` either dialect, or the name of a tensor or scalar ("same as")
    output `if expression`  exists only when that expression of sizes and scalar arguments is truthy

A backend is a module `rocm_infer.<folder>.<op>` with `launch(*outputs, *scratch, *inputs, **scalars)`, or with `run(...)`, which
has the arguments and results of the reference. Optional are `supports(call) -> str | None` (the reason of a refusal) and
`scratch(call) -> [(shape, dtype), ...]`.

A decode step makes hundreds of calls, so a call costs one look-up: shapes, dtypes, devices and scalars are the key of a plan, made
by all the checks when the key is new. `Op.using` writes the function that does this for the op's own arguments, as `dataclass`
writes `__init__`: Python then binds them, and no list or dict of them is made.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from rocm_infer import arch as archs

P = ParamSpec("P")
R = TypeVar("R")

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "f32": (torch.float32,),
    "i32": (torch.int32,),
    "i64": (torch.int64,),
    "u8": (torch.uint8,),
    "fp8": FP8,
}
FOLDERS = {"cpu": "cpu_kernels", "triton": "triton_kernels", "hip": "hip"}
CPU_ORDER = ("cpu", "reference")
GPU_ORDER = ("hip", "triton", "reference")
MAX_PLANS = 4096

_TENSOR = re.compile(r"(\w+)([?!]*)\[([^\]]*)\](?::([\w| ]+?))?(?: if (.+))?$")
_NAME = re.compile(r"[A-Za-z_]\w*")
# A call of an op on one backend. Arguments that are missing or have no shape find no plan; making one says what is wrong.
_FIND = """
def make(plans, find, defaults):
    def {name}({parameters}, **unknown):
        try:
            key = (archs.roles(), {key})
        except AttributeError:
            key = None
        plan = plans.get(key)
        if plan is None or unknown:
            plan = find(key, dict({by_name}), unknown)
        {do}
    return {name}
"""
_RUN = """
        if plan.launch is None:
            return plan.body({arguments})
        if plan.single is not None:
            made = empty(*plan.single)
            plan.launch(made, {arguments})
            return made
        made = [empty(*tensor) for tensor in plan.made]
        plan.launch(*made, {arguments})
        return plan.returned(made)
"""


class _Missing:
    """Stands for an argument that a call does not give."""

    shape = dtype = device = None


_MISSING = _Missing()


class Cost(NamedTuple):
    """What an op must do at least: bytes that cross the memory bus once, and arithmetic operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class TensorSpec:
    name: str
    optional: bool
    written: bool
    dims: tuple[str, ...]
    types: tuple[str, ...]
    condition: str | None


@dataclass(frozen=True)
class Call:
    """One checked call: sizes by letter, dtypes by tensor name (absent optional tensors are missing), scalar arguments."""

    op: str
    device: torch.device
    dims: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    scalars: Mapping[str, Any]


_Wanted = tuple[tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class _Plan:
    """What a kind of call comes to. made: the outputs, then scratch; single: the output where that is all."""

    call: Call
    backend: str
    reason: str
    body: Callable[..., Any] | None
    launch: Callable[..., None] | None
    made: tuple[_Wanted, ...]
    num_outputs: int
    single: _Wanted | None

    def returned(self, made: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        return made[0] if self.num_outputs == 1 else tuple(made[: self.num_outputs]) or None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates every output and scratch tensor of kernels; tests replace it by one that poisons and fences."""
    return torch.empty(*shape, dtype=dtype, device=device)  # torch takes half a microsecond more for a tuple


def _split(text: str) -> list[str]:
    """Split at commas that are outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _parse(text: str) -> tuple[TensorSpec, ...]:
    specs = []
    for item in _split(text):
        match = _TENSOR.match(item)
        if match is None:
            raise ValueError(f"op signature: cannot read {item!r}")
        name, marks, dims, types, condition = match.groups()
        parsed_dims = tuple(part.strip() for part in dims.split(",") if part.strip())
        parsed_types = tuple(re.split(r"\s*\|\s*|\s+or\s+", types.strip())) if types else ()
        specs.append(TensorSpec(name, "?" in marks, "!" in marks, parsed_dims, parsed_types, condition))
    return tuple(specs)


@functools.lru_cache(maxsize=512)
def _compiled(expression: str) -> Any:
    """`ceil(a/b)` is exact integer division rounded up; everything else is Python arithmetic on sizes."""
    source = re.sub(r"ceil\(([^/]+)/([^)]+)\)", r"(-(-(\1) // (\2)))", expression)
    return compile(source, expression, "eval")


def _evaluate(expression: str, names: Mapping[str, Any]) -> int:
    return int(eval(_compiled(expression), {"__builtins__": {}}, dict(names)))


def _free_names(expression: str) -> set[str]:
    return set(_NAME.findall(expression)) - {"ceil"}


class Op(Generic[P, R]):
    """A contract and its backends. Calling it dispatches; `.using(backend)` insists; `.fn` is the reference."""

    def __init__(
        self,
        fn: Callable[P, R],
        signature: str,
        inputs: Callable[..., dict[str, Any]],
        cost: Callable[..., Cost],
        order: tuple[str, ...],
        check: Callable[[Call], str | None] | None,
    ) -> None:
        self.fn = fn
        self.name = fn.__name__
        self.signature = signature
        self.inputs = inputs
        self.cost = cost
        self.order = order
        self.check = check
        given, produced = signature.split("->")
        self.tensors = _parse(given)
        self.outputs = _parse(produced.strip().removeprefix("()"))
        parameters = inspect.signature(fn).parameters
        self._names = tuple(parameters)
        self._defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
        self._tensor_names = tuple(spec.name for spec in self.tensors)
        self._scalar_names = tuple(name for name in parameters if name not in self._tensor_names)
        if self._names[: len(self.tensors)] != self._tensor_names:
            raise ValueError(f"{self.name}: signature lists {self._tensor_names}, the function takes {self._names}")
        self._plans: dict[str, dict[Any, _Plan]] = {}
        self._written: dict[tuple[str, str], Callable[..., Any]] = {}
        functools.update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.using("auto")(*args, **kwargs)

    def using(self, backend: str) -> Callable[P, R]:
        """The op on one named backend; it raises with the reason where that backend cannot serve. "auto" dispatches.

        "cpu" stands for the CPU's own order: its kernels, and the reference where they do not serve.
        """
        return self._function(backend, _RUN)

    def plan(self, backend: str, *args: P.args, **kwargs: P.kwargs) -> tuple[Call, str, str]:
        """(checked call, backend, reason) of a call, without running it. Raises what the call would raise when planned."""
        plan: _Plan = self._function(backend, "return plan")(*args, **kwargs)
        return plan.call, plan.backend, plan.reason

    def empty_outputs(self, call: Call) -> list[torch.Tensor]:
        """Tensors for what the call returns."""
        wanted = [self._output(spec, call) for spec in self.outputs if self._wanted(spec, call)]
        return [torch.empty(shape, dtype=dtype, device=call.device) for shape, dtype in wanted]

    def _function(self, backend: str, do: str) -> Callable[..., Any]:
        """The function with the op's arguments that finds the plan of a call on a backend and then does `do`."""
        found = self._written.get((backend, do))
        if found is None:
            plans = self._plans.setdefault(backend, {})
            names: dict[str, Any] = {}
            exec(self._source(do), globals(), names)
            find = functools.partial(self._find, backend, plans)
            found = self._written[backend, do] = names["make"](plans, find, self._defaults)
        return found

    def _source(self, do: str) -> str:
        """`_FIND` and `do` with the op's arguments filled in."""
        key = []
        for spec in self.tensors:
            described = f"{spec.name}.shape, {spec.name}.dtype, {spec.name}.device"
            key.append(f"None if {spec.name} is None else ({described})" if spec.optional else described)
        parameters = [f"{name}=defaults.get({name!r}, _MISSING)" for name in self._names]
        if self._scalar_names:
            parameters.insert(len(self.tensors), "*")
        by_name = [f"{name}={name}" for name in self._names]
        arguments = [*self._tensor_names, *by_name[len(self.tensors) :]]
        fields = {
            "name": self.name,
            "parameters": ", ".join(parameters),
            "key": ", ".join([*key, *self._scalar_names]),
            "by_name": ", ".join(by_name),
            "arguments": ", ".join(arguments),
        }
        return _FIND.format(do=do.strip().format(**fields), **fields)

    def _find(self, backend: str, plans: dict[Any, _Plan], key: Any, values: dict[str, Any], unknown: dict[str, Any]) -> _Plan:
        """The plan of a call for the first time, kept for the next one, or the error that says what is wrong with it."""
        given = {name: value for name, value in values.items() if value is not _MISSING}
        plan = self._make_plan(backend, self._bind((), {**given, **unknown}))
        if len(plans) >= MAX_PLANS:
            plans.clear()
        plans[key] = plan
        return plan

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        values = {**self._defaults, **dict(zip(self._names, args)), **kwargs}
        if values.keys() != set(self._names):
            unknown = sorted(set(kwargs) - set(self._names))
            missing = [name for name in self._names if name not in values]
            raise TypeError(
                f"{self.name}: missing arguments {missing}, unknown arguments {unknown}; signature: {self.signature}"
            )
        return values

    def _make_plan(self, backend: str, values: Mapping[str, Any]) -> _Plan:
        call = self._check(values)
        refusal = self.check(call) if self.check else None
        if refusal is not None:
            raise ValueError(f"{self.name}: {refusal}; signature: {self.signature}")
        chosen, module, reason = self._choose(backend, call)
        scratch = getattr(module, "scratch", None)
        outputs = [self._output(spec, call) for spec in self.outputs if self._wanted(spec, call)]
        made = tuple((*tensor, call.device) for tensor in (*outputs, *(scratch(call) if scratch else ())))
        return _Plan(
            call=call,
            backend=chosen,
            reason=reason,
            body=self.fn if module is None else getattr(module, "run", None),
            launch=getattr(module, "launch", None),
            made=made,
            num_outputs=len(outputs),
            single=made[0] if len(made) == len(outputs) == 1 else None,
        )

    def _check(self, values: Mapping[str, Any]) -> Call:
        scalars = {name: values[name] for name in self._scalar_names}
        bound: dict[str, tuple[int, str]] = {}
        dtypes: dict[str, torch.dtype] = {}
        device: torch.device | None = None
        for spec in self.tensors:
            tensor = values[spec.name]
            if tensor is None and spec.optional:
                continue
            if not isinstance(tensor, torch.Tensor):
                self._fail(spec, "a tensor", type(tensor).__name__)
            if tensor.dim() != len(spec.dims):
                self._fail(spec, f"{len(spec.dims)} dimensions [{', '.join(spec.dims)}]", f"shape {tuple(tensor.shape)}")
            if device is not None and tensor.device != device:
                self._fail(spec, f"device {device}", str(tensor.device))
            device = tensor.device
            for dim, size in zip(spec.dims, tensor.shape):
                if _NAME.fullmatch(dim) and dim not in scalars:
                    bound.setdefault(dim, (size, spec.name))
            dtypes[spec.name] = tensor.dtype
        sizes = {name: size for name, (size, _) in bound.items()}
        for spec in self.tensors:
            if spec.name in dtypes:
                self._check_dtype(spec, dtypes, scalars)
                self._check_shape(spec, values[spec.name], bound, {**sizes, **scalars})
        if device is None:
            raise ValueError(f"{self.name}: expected at least one tensor, got none")
        return Call(self.name, device, sizes, dtypes, scalars)

    def _check_dtype(self, spec: TensorSpec, dtypes: Mapping[str, torch.dtype], scalars: Mapping[str, Any]) -> None:
        if not spec.types:
            return
        allowed = [dtype for name in spec.types for dtype in self._named_dtypes(name, dtypes, scalars)]
        if allowed and dtypes[spec.name] not in allowed:
            self._fail(spec, "dtype " + " or ".join(str(d).removeprefix("torch.") for d in allowed), str(dtypes[spec.name]))

    def _named_dtypes(
        self, name: str, dtypes: Mapping[str, torch.dtype], scalars: Mapping[str, Any]
    ) -> tuple[torch.dtype, ...]:
        if name in DTYPES:
            return DTYPES[name]
        found = dtypes.get(name, scalars.get(name))
        return () if found is None else (found,)

    def _check_shape(
        self, spec: TensorSpec, tensor: torch.Tensor, bound: Mapping[str, tuple[int, str]], names: Mapping[str, Any]
    ) -> None:
        for dim, size in zip(spec.dims, tensor.shape):
            if not _free_names(dim) <= names.keys():
                continue
            expected = _evaluate(dim, names)
            if size != expected:
                origin = bound.get(dim)
                where = f" (from {origin[1]})" if origin and origin[1] != spec.name else ""
                self._fail(spec, f"size {dim} = {expected}{where}", f"{size} in shape {tuple(tensor.shape)}")

    def _fail(self, spec: TensorSpec, expected: str, got: str) -> None:
        raise ValueError(f"{self.name}: {spec.name}: expected {expected}, got {got}; signature: {self.signature}")

    def _wanted(self, spec: TensorSpec, call: Call) -> bool:
        return spec.condition is None or bool(_evaluate(spec.condition, {**call.dims, **call.scalars}))

    def _output(self, spec: TensorSpec, call: Call) -> tuple[tuple[int, ...], torch.dtype]:
        names = {**call.dims, **call.scalars}
        for name in spec.types:
            found = self._named_dtypes(name, call.dtypes, call.scalars)
            if found:
                return tuple(_evaluate(dim, names) for dim in spec.dims), found[0]
        raise ValueError(f"{self.name}: the dtype of output {spec.name} is not known; pass one of {', '.join(spec.types)}")

    def _choose(self, backend: str, call: Call) -> tuple[str, ModuleType | None, str]:
        if backend == "reference":
            return "reference", None, "asked for"
        if backend not in ("auto", "cpu") or (backend == "cpu" and archs.runs_gpu_kernels(call.device)):
            module, reason = self._candidate(backend, call)
            if reason is not None:
                raise NotImplementedError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
            return backend, module, "asked for"
        refusals: list[str] = []
        for name in self.order if archs.runs_gpu_kernels(call.device) else CPU_ORDER:
            if name == "reference":
                return name, None, "; ".join(refusals) or "the reference is the plain choice here"
            module, reason = self._candidate(name, call)
            if reason is None:
                return name, module, f"first of the order that serves; refused before: {'; '.join(refusals) or 'none'}"
            refusals.append(f"{name}: {reason}")
        raise NotImplementedError(f"{self.name}: no backend serves this call: {'; '.join(refusals)}")

    def _candidate(self, backend: str, call: Call) -> tuple[ModuleType | None, str | None]:
        """The backend's module for this op, or the reason why it cannot serve the call."""
        if backend not in FOLDERS:
            return None, f"unknown backend, expected one of {', '.join(('auto', 'reference', *FOLDERS))}"
        if backend == "cpu" and archs.runs_gpu_kernels(call.device):
            return None, f"expected a CPU, got the device {call.device}"
        path = f"rocm_infer.{FOLDERS[backend]}.{self.name}"
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name and (path == error.name or path.startswith(error.name + ".")):
                return None, "no kernel written for this op"
            raise
        supports = getattr(module, "supports", None)
        return module, supports(call) if supports else None


def op(
    signature: str,
    *,
    inputs: Callable[..., dict[str, Any]],
    cost: Callable[..., Cost],
    order: tuple[str, ...] = GPU_ORDER,
    check: Callable[[Call], str | None] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function the contract of an op. `inputs(dims, device=, seed=, ...)` makes arguments, `cost(dims, ...)` the floor.

    `check(call)` says what is wrong with sizes and scalars beyond the signature, None if nothing: no backend needs to look again.
    """

    def wrap(fn: Callable[P, R]) -> Op[P, R]:
        return Op(fn, signature, inputs, cost, order, check)

    return wrap


def ceil_div(a: int, b: int) -> int:
    return math.ceil(a / b) if b else 0


def registry() -> dict[str, Op[..., Any]]:
    """All ops by name, found by listing this package."""
    import pkgutil

    found: dict[str, Op[..., Any]] = {}
    package = importlib.import_module("rocm_infer.ops")
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"rocm_infer.ops.{info.name}")
            found[info.name] = getattr(module, info.name)
    return found


class Ops:
    """Every op bound to one backend: `ops = Ops("auto"); ops.rms_norm(x, weight, eps=1e-6)`. Models receive one."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        for name, found in registry().items():
            setattr(self, name, found.using(backend))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no op named {name!r}")
