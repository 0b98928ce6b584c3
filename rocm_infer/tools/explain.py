# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer explain`: which op has which kernels, and which one a call on this machine would get, with the reason."""

from __future__ import annotations

import argparse
import importlib.util
import inspect

from rocm_infer.ops._op import CPU_ORDER, FOLDERS, Op, registry
from rocm_infer.platform import has_gpu

COLUMNS = ("reference", *FOLDERS)


def backends(op: Op) -> list[str]:
    """The reference, and every backend that has a kernel of the op's name."""
    found = ["reference"]
    for name, folder in FOLDERS.items():
        package = f"rocm_infer.{folder}"
        if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{op.name}"):
            found.append(name)
    return found


def support_table() -> str:
    """Markdown: one row per op, one column per backend."""
    lines = [f"| op | {' | '.join(COLUMNS)} | what |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for name, op in sorted(registry().items()):
        served = backends(op)
        module = inspect.getmodule(op.fn)
        what = (module.__doc__ or "").strip().split("\n")[0].rstrip(".") if module else ""
        lines.append(f"| `{name}` | {' | '.join('yes' if column in served else '' for column in COLUMNS)} | {what} |")
    return "\n".join(lines)


def order_table() -> str:
    """Plain text: for each op the backends in the order in which a call here tries them."""
    lines = []
    for name, op in sorted(registry().items()):
        served = backends(op)
        order = [backend for backend in (op.order if has_gpu() else CPU_ORDER) if backend in served]
        lines.append(f"{name:<14} {' > '.join(order)}")
    place = "GPU" if has_gpu() else "CPU"
    return f"tensors on the {place}: the first that accepts the call's sizes and types serves it\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rocm-infer explain", description="which op has which kernels, and which serves here")
    parser.add_argument("--markdown", action="store_true", help="the support table of README.md")
    args = parser.parse_args(argv)
    print(support_table() if args.markdown else order_table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
