# SPDX-License-Identifier: Apache-2.0
"""A copy of a checkpoint with the weights of its linear maps in fp8 blocks of 128 x 128, as DeepSeek ships them.

python -m training.quantise rocm_infer/assets/tiny-deepseek build/tiny-deepseek-fp8
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rocm_infer.ops.quant_fp8 import BLOCK, SMALLEST_AMAX

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
QUANTISED = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?\.weight$")
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (codes [N, K], scale [ceil(N/128), ceil(K/128)] f32); value = code * scale of its block."""
    n, k = weight.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    padded = F.pad(weight.float(), (0, columns * BLOCK - k, 0, rows * BLOCK - n)).view(rows, BLOCK, columns, BLOCK)
    scale = padded.abs().amax((1, 3)).clamp(min=SMALLEST_AMAX) / LARGEST
    codes = (padded / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).reshape(rows * BLOCK, columns * BLOCK)[:n, :k]
    return codes.to(FP8).contiguous(), scale


def convert(source: Path, target: Path) -> int:
    """Writes the copy to `target`, which must not exist; returns the number of quantised matrices."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    out: dict[str, torch.Tensor] = {}
    count = 0
    for file in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if QUANTISED.search(name):
                out[name], out[name + "_scale_inv"] = quantise_blocks(weight)
                count += 1
            else:
                out[name] = weight
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}, indent=2) + "\n")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quantise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    print(f"{convert(args.source, args.target)} matrices in fp8")


if __name__ == "__main__":
    main()
