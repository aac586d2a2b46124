"""The extension for this Python and this GPU: one that was carried here, or built in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

from alitok_fast.info import runs_on
from gpu.items import Context, Items, Number, Skipped
from gpu.sources import CARRIED, MANIFEST, ROOT, kernel_sources

items = Items()


def extension_file() -> Path:
    return ROOT / "alitok_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def carried(device: torch.device) -> Path | None:
    """The binary in the carried folder, if it is for this Python and GPU and made of these sources."""
    manifest = CARRIED / MANIFEST
    if not manifest.is_file():
        return None
    made = json.loads(manifest.read_text())
    binary = CARRIED / extension_file().name
    if made["sources"] != kernel_sources():
        print(f"{CARRIED.name}: made of other sources ({made['sources']}, these are {kernel_sources()})")
        return None
    if not binary.is_file():
        print(f"{CARRIED.name}: no {binary.name} in it, but {made['binary']}")
        return None
    if device.type == "cuda" and not runs_on(made["architecture"].replace(";", ","), capability(device)):
        print(f"{CARRIED.name}: for {made['architecture']}, and this GPU is sm_{capability(device)}")
        return None
    return binary


def capability(device: torch.device) -> str:
    """90 for compute capability 9.0."""
    return "".join(map(str, torch.cuda.get_device_capability(device)))


@items("extension")
def extension(context: Context) -> list[Number]:
    begin, target = time.monotonic(), extension_file()
    if context.device.type == "cpu" and target.is_file():
        # A rehearsal looks at the checkout as it is; an editable installation has built it already.
        raise Skipped(f"{target.name} is there")
    binary = carried(context.device)
    if binary is not None:
        staged = target.with_suffix(".new")  # not written in place: a process that has the old file loaded keeps it
        shutil.copyfile(binary, staged)
        os.replace(staged, target)
        print(f"{target.name}: the one that was carried here")
        return [Number("copying it", time.monotonic() - begin, "s", key="copied")]
    environment = dict(os.environ)
    if context.device.type == "cuda":
        environment.setdefault("CMAKE_CUDA_ARCHITECTURES", f"{capability(context.device)}-real")
        environment.setdefault("ALITOK_CUDA", "1")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [Number("building it", time.monotonic() - begin, "s", key="built")]


@items("it loads")
def loads(context: Context) -> list[Number]:
    """In a process of its own, because this one may hold the file that was there before."""
    code = "import json; from alitok_fast.info import info; print(json.dumps(info()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    print(json.dumps(found, indent=1))
    if not found["extension"]["loaded"]:
        raise RuntimeError(found["extension"]["off"][0])
    if context.device.type == "cuda" and found["cuda"]["off"]:
        raise RuntimeError(found["cuda"]["off"][0])
    return []


if __name__ == "__main__":
    items.main()
