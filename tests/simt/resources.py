"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them, against resources.json.

The whole extension is built in build/simt/resources, for every architecture and as PTX, which later GPUs translate;
a source is compiled again when it or a header of it has changed.

    python tests/simt/resources.py            compare, exit 1 with the differences
    python tests/simt/resources.py --update   write resources.json; read the diff before committing it
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import compiler_cache  # noqa: E402

CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "simt" / "resources"
TABLE = HERE / "resources.json"
ARCHITECTURES = ["80", "86", "90"]
PTX = "90"
# Noise between patch releases of the compiler is allowed, a change that costs a block per SM or starts to spill is not.
SLACK = {"registers": 8, "stack_bytes": 16, "spill_bytes": 32, "static_shared_bytes": 0}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc_release() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", output)[1]


def build() -> Path:
    """The extension with all kernels, and a report beside each object; raises RuntimeError with the first errors."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    tools = nvcc_release(), shutil.which("nvcc"), sys.executable, str(torch), str(CSRC)  # a build is for these
    folder = BUILD / hashlib.sha256(repr(tools).encode()).hexdigest()[:8]
    configure = [
        "cmake", "-S", str(CSRC.parent), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DALITOK_TORCH={torch}", "-DALITOK_CUDA=ON",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", f"-DCMAKE_CUDA_COMPILER_LAUNCHER={sys.executable};{HERE / 'keep_report.py'}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # of the other sources: compiles in a quarter of the time
    ]  # fmt: skip
    architectures = ";".join([*(f"{number}-real" for number in ARCHITECTURES), f"{PTX}-virtual"])
    settings = os.environ | compiler_cache.SETTINGS | {"CMAKE_CUDA_ARCHITECTURES": architectures}
    for command in (configure, ["cmake", "--build", str(folder), "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, env=settings)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    (library,) = folder.glob("_C*.so")
    return library


def readable(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |alitok::|\(anonymous namespace\)::", "", name).split("(")[0]


def measure() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """What each kernel uses, by source, name and architecture."""
    folder = build().parent
    table = {}
    for source in sorted(CSRC.glob("*.cu")):
        (report,) = folder.rglob(f"{source.name}.o.txt")
        kernels: dict[str, dict[str, dict[str, int]]] = {}
        for entry in ENTRY.finditer(report.read_text()):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            kernels.setdefault(readable(entry["name"]), {})[entry["architecture"]] = {
                "registers": int(entry["registers"]),
                "stack_bytes": int(entry["stack"]),
                "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
        expected = {f"sm_{number}" for number in ARCHITECTURES}
        incomplete = [name for name, uses in kernels.items() if set(uses) != expected]
        if not kernels or incomplete:
            raise RuntimeError(f"{source.name}: the compiler does not report every kernel for every architecture")
        table[source.name] = {name: dict(sorted(uses.items())) for name, uses in sorted(kernels.items())}
    return table


def differences(recorded: dict, actual: dict) -> list[str]:
    """Kernels that use more than recorded. One that is not recorded may not spill, whatever else it uses, and one that
    is recorded may only with a reason."""
    lines = []
    for file, kernels in actual.items():
        for name, uses in kernels.items():
            for architecture, used in uses.items():
                fresh = {**used, "stack_bytes": 0, "spill_bytes": 0}
                allowed = recorded["kernels"].get(file, {}).get(name, {}).get(architecture, fresh)
                for quantity, slack in SLACK.items():
                    if used[quantity] > allowed[quantity] + slack:
                        change = f"{quantity} {allowed[quantity]} -> {used[quantity]}"
                        lines.append(f"{file}: {name}, {architecture}: {change}")
                if allowed["spill_bytes"] > 0 and name not in recorded["reasons"]:
                    lines.append(f"{file}: {name}, {architecture}: spills, without a reason in {TABLE.name}")
    return lines


def written(table: dict) -> str:
    """JSON, indented, but what a kernel uses on one architecture in one line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    update = parser.parse_args().update
    if shutil.which("nvcc") is None:
        sys.exit("nvcc: expected on PATH, not found")
    if update:
        reasons = json.loads(TABLE.read_text())["reasons"]  # written by hand
        TABLE.write_text(written({"nvcc": nvcc_release(), "reasons": reasons, "kernels": measure()}))
        return 0
    recorded = json.loads(TABLE.read_text())
    found = differences(recorded, measure())
    print("\n".join(found) or f"{TABLE.name}: as recorded")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
