# SPDX-License-Identifier: Apache-2.0
"""Everything for a first look at a GPU in one command and a fixed time: op tests compiled on it, then microbenchmarks.

python -m bench.gpu [--out FOLDER] [--seconds 360]

Half of the time is for the tests, the rest for `bench.kernels --quick`. FOLDER gets tests.txt, kernels.txt and kernels.json; both
parts run whatever the other finds. Kernels are compiled as they are met: a second run, with Triton's cache filled, gets further.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


def run(command: list[str], log: Path, seconds: float, **variables: str) -> str:
    """Run a command with its output in a file; its last lines, and how it ended."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables}, text=True)
        try:
            code = process.wait(seconds)
            ended = f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            ended = f"stopped after {seconds:.0f} s"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    return f"$ {' '.join(command[1:])}\n{tail}\n{ended}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the logs (default build/gpu)")
    parser.add_argument("--seconds", type=float, default=360, help="for everything together (default 360)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    workers = str(max(1, min(12, (os.cpu_count() or 2) - 2)))  # they compile on the CPU and share the GPU
    parallel = ["-n", workers, "--dist", "worksteal"]
    tests = [sys.executable, "-m", "pytest", "tests/ops", "--gpu", "-q", "--maxfail=50", *parallel]
    print(
        run(tests, args.out / "tests.txt", args.seconds / 2, HYPOTHESIS_PROFILE=os.environ.get("HYPOTHESIS_PROFILE", "brief"))
    )
    left = args.seconds - (time.monotonic() - start)
    kernels = [sys.executable, "-m", "bench.kernels", "--quick", "--peer", "--rounds", "9", "--seconds", str(int(0.8 * left))]
    kernels += ["--json", str(args.out / "kernels.json")]
    print(run(kernels, args.out / "kernels.txt", left))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
