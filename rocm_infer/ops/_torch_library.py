# SPDX-License-Identifier: Apache-2.0
"""The ops as `torch.ops.rocm_infer.<op>`, with schemas and shapes made from their contracts, for torch.compile.

The engine calls ops directly, which is cheaper; graph capture needs no registration. An op with outputs returns a list of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from rocm_infer.ops._op import Op, registry

NAMESPACE = "rocm_infer"
SCALAR_TYPES = {
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}


def schema(op: Op[..., Any]) -> str:
    """The op's signature in the language of torch.library."""
    parts, starred = [], False
    specs = {spec.name: (place, spec) for place, spec in enumerate(op.tensors)}
    for name, parameter in inspect.signature(op.fn).parameters.items():
        given = parameter.default is not inspect.Parameter.empty
        if name in specs:
            place, spec = specs[name]
            alias = f"({chr(ord('a') + place)}!)" if spec.written else ""
            parts.append(f"Tensor{alias}{'?' if spec.optional else ''} {name}{'=None' if given else ''}")
            continue
        if not starred:
            parts.append("*")
            starred = True
        default = f"={_literal(parameter.default)}" if given else ""
        parts.append(f"{SCALAR_TYPES[str(parameter.annotation)]} {name}{default}")
    return f"{op.name}({', '.join(parts)}) -> {'Tensor[]' if op.outputs else '()'}"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _run(op: Op[..., Any], *args: Any, **kwargs: Any) -> list[torch.Tensor] | None:
    found = op(*args, **kwargs)
    if not op.outputs:
        return None
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _shapes(op: Op[..., Any], *args: Any, **kwargs: Any) -> list[torch.Tensor] | None:
    """Empty outputs of the right sizes, for tensors without data."""
    made = op.empty_outputs(op._check(op._bind(args, kwargs)))
    return made if op.outputs else None


@functools.cache
def register() -> torch.library.Library:
    """Defines every op once; keep what it returns alive."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in registry().values():
        run: Callable[..., Any] = functools.partial(_run, op)
        library.define(schema(op))
        library.impl(op.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", functools.partial(_shapes, op), lib=library)
    return library
