"""Every CUDA kernel compiles for every architecture, and uses the registers and memory that resources.json says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_registers_and_spills():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    recorded = json.loads((HERE / "resources.json").read_text())["nvcc"]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)[1]
    if release != recorded:
        pytest.skip(f"resources.json was recorded with nvcc {recorded}, this is {release}: registers may differ")
    done = subprocess.run([sys.executable, str(HERE / "resources.py")], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nmeant? python tests/simt/resources.py --update"
