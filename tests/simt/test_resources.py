"""Every CUDA kernel compiles for every architecture, into an extension that loads, and uses the registers and memory
that resources.json says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import resources

HERE = Path(__file__).resolve().parent
SHOW_ARCHITECTURES = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["cuda_archs"])
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def tools():
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def test_the_extension_has_all_kernels(tmp_path: Path):
    """Built for a torch without CUDA, where they are asked for, and loaded where no GPU is."""
    library = resources.build()
    show = [sys.executable, "-c", SHOW_ARCHITECTURES, library]
    done = subprocess.run(show, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "80-real,86-real,90-real,90-virtual", done.stderr


def test_registers_and_spills():
    recorded = json.loads((HERE / "resources.json").read_text())["nvcc"]
    if (release := resources.nvcc_release()) != recorded:
        pytest.skip(f"resources.json was recorded with nvcc {recorded}, this is {release}: registers may differ")
    done = subprocess.run([sys.executable, str(HERE / "resources.py")], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nmeant? python tests/simt/resources.py --update"
