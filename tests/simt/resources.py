"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them, against resources.json.

    python tests/simt/resources.py            compare, exit 1 with the differences
    python tests/simt/resources.py --update   write resources.json; read the diff before committing it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "simt" / "resources"
TABLE = HERE / "resources.json"
ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={ARCHITECTURE}", "-cubin", "-Xptxas=-v"]
# Noise between patch releases of the compiler is allowed, a change that costs a block per SM or starts to spill is not.
SLACK = {"registers": 8, "stack_bytes": 16, "spill_bytes": 32, "static_shared_bytes": 0}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc_release() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", output)[1]


def ptxas_report(source: Path) -> str:
    """The compiler's report, from build/simt/resources when nothing that the kernel could include has changed."""
    digest = hashlib.sha256(repr((nvcc_release(), FLAGS)).encode())
    for file in [source, *sorted(CSRC.glob("*.h"))]:
        digest.update(file.name.encode() + file.read_bytes())
    stored = BUILD / f"{source.stem}.{digest.hexdigest()[:16]}.txt"
    if not stored.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        cubin = BUILD / f"{source.stem}.cubin"
        command = ["nvcc", *FLAGS, f"-I{CSRC}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[:4000]}")
        for old in BUILD.glob(f"{source.stem}.*.txt"):
            old.unlink()
        stored.write_text(done.stderr)
    return stored.read_text()


def readable(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |alitok::|\(anonymous namespace\)::", "", name).split("(")[0]


def measure() -> dict[str, dict[str, dict[str, int]]]:
    sources = sorted(CSRC.glob("*_cuda.cu"))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(ptxas_report, sources))
    table = {}
    for source, report in zip(sources, reports, strict=True):
        kernels = {}
        for entry in ENTRY.finditer(report):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            kernels[readable(entry["name"])] = {
                "registers": int(entry["registers"]),
                "stack_bytes": int(entry["stack"]),
                "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
        if not kernels:
            raise RuntimeError(f"{source.name}: the compiler reports no kernel")
        table[source.name] = dict(sorted(kernels.items()))
    return table


def differences(expected: dict, actual: dict) -> list[str]:
    """Kernels that use more than recorded. One that is not recorded may not spill, whatever else it uses."""
    lines = []
    for file, kernels in actual.items():
        for name, used in kernels.items():
            recorded = expected.get(file, {}).get(name, {**used, "stack_bytes": 0, "spill_bytes": 0})
            for quantity, slack in SLACK.items():
                if used[quantity] > recorded[quantity] + slack:
                    lines.append(f"{file}: {name}: {quantity} {recorded[quantity]} -> {used[quantity]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    update = parser.parse_args().update
    if shutil.which("nvcc") is None:
        sys.exit("nvcc: expected on PATH, not found")
    if update:
        table = {"nvcc": nvcc_release(), "architecture": ARCHITECTURE, "kernels": measure()}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        return 0
    recorded = json.loads(TABLE.read_text())
    found = differences(recorded["kernels"], measure())
    print("\n".join(found) or f"{TABLE.name}: as recorded")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
