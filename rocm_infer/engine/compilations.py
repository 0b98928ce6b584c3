# SPDX-License-Identifier: Apache-2.0
"""Triton's compilations: how many happen while serving, and bundles of kernels compiled ahead by `rocm-infer compile`.

A bundle is a folder with one folder per architecture, and there a manifest.json beside entries of Triton's cache. At start-up the
entries are copied into the cache of this machine: Triton writes absolute paths into them, so they cannot be used where they lie.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GROUP = "__grp__"  # Triton's file that lists the others of an entry


class CompileCounter:
    """Triton's compilation listener: counts kernels that were compiled, not those found in a cache."""

    def __init__(self, following: Any = None) -> None:
        self.count = 0
        self.following = following

    def __call__(self, **event: Any) -> None:
        if not event["cache_hit"]:
            self.count += 1
            seconds = event["times"].total / 1e6
            logger.info("compiled kernel %s in %.1f s; `rocm-infer compile` does that ahead", event["src"].name, seconds)
        if self.following is not None:
            self.following(**event)


def compile_counter(device: torch.device) -> CompileCounter | None:
    """The process's counter, listening from its first use on; None on a CPU that has nothing to do with Triton."""
    if device.type == "cpu" and "triton" not in sys.modules:
        return None
    from triton import knobs

    listener = knobs.compilation.listener
    if not isinstance(listener, CompileCounter):
        listener = knobs.compilation.listener = CompileCounter(listener)
    return listener


def triton_build() -> dict[str, str]:
    """What an entry of Triton's cache depends on beside the kernel: {version, key}. Another build of the same version differs."""
    import triton
    from triton.runtime import cache

    key = hashlib.sha256(cache.triton_key().encode()).hexdigest()
    return {"triton": triton.__version__, "key": key}


def write_manifest(folder: Path, arch: str, kernels: Mapping[str, str], made_for: Mapping[str, Any]) -> None:
    """Complete the bundle of an architecture. kernels: name by the folder of its entry; entries of others are removed."""
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in kernels:
            shutil.rmtree(entry)
    listed = {
        key: {"kernel": kernel, "files": sorted(file.name for file in (folder / key).iterdir())}
        for key, kernel in sorted(kernels.items())
    }
    made = {"arch": arch, **triton_build(), "made_for": dict(made_for), "entries": listed}
    (folder / MANIFEST).write_text(json.dumps(made, indent=1) + "\n")


def install_bundle(bundle: Path, device: torch.device) -> int:
    """Copy a bundle's kernels into Triton's cache; returns how many were not there yet.

    Raises ConfigError if it is not for this device or this Triton, or is not complete.
    """
    if device.type == "cpu":
        raise ConfigError("kernel_bundle", "kernel_bundle: kernels are compiled for GPUs, but the device is the CPU")
    arch = archs.current(device).name
    manifest = _read_manifest(bundle, arch)
    mine = triton_build()
    if manifest["key"] != mine["key"]:
        raise ConfigError(
            "kernel_bundle",
            f"kernel_bundle: {bundle} was compiled by Triton {manifest['triton']}, here is {mine['triton']}"
            + (" in another build" if manifest["triton"] == mine["triton"] else "")
            + ": run `rocm-infer compile` with the Triton that serves",
        )
    cache = _cache_folder()
    missing = [entry for entry in manifest["entries"] if not (cache / entry).is_dir()]
    for entry in missing:
        _install_entry(bundle / arch / entry, cache / entry)
    logger.info("kernel bundle: %d kernels for %s, %d new in %s", len(manifest["entries"]), arch, len(missing), cache)
    return len(missing)


def _read_manifest(bundle: Path, arch: str) -> dict[str, Any]:
    """The manifest of an architecture, its files checked."""
    path = bundle / arch / MANIFEST
    if not path.is_file():
        others = sorted(found.parent.name for found in bundle.glob(f"*/{MANIFEST}"))
        raise ConfigError(
            "kernel_bundle",
            f"kernel_bundle: {bundle} has nothing for {arch} (it has {', '.join(others) or 'no manifest at all'}); "
            f"make it with `rocm-infer compile --arch {arch} --output {bundle}`",
        )
    manifest: dict[str, Any] = json.loads(path.read_text())
    for entry, listed in manifest["entries"].items():
        for file in listed["files"]:
            if not (path.parent / entry / file).is_file():
                message = f"kernel_bundle: {path.parent / entry / file} of kernel {listed['kernel']} is missing; compile again"
                raise ConfigError("kernel_bundle", message)
    return manifest


def _cache_folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def _install_entry(source: Path, target: Path) -> None:
    """Copy one entry so that it appears whole or not at all, its list of files rewritten to where they are now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        shutil.copytree(source, made)
        for group in made.glob(f"{GROUP}*"):
            names = json.loads(group.read_text())["child_paths"]
            group.write_text(json.dumps({"child_paths": {name: str(target / name) for name in names}}))
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():  # else another worker was faster
                raise
