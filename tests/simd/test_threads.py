"""csrc/threads.cpp: when threads are worth it, on simulated machines, and what control groups leave to a process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_threads_cost_little_where_cores_are_busy_and_nothing_where_they_are_free(tmp_path: Path):
    program, source = tmp_path / "crew", Path(__file__).with_name("crew.cpp")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-Wall", f"-I{ROOT / 'csrc'}", str(source), str(ROOT / "csrc/threads.cpp")]
        + ["-pthread", "-o", str(program)],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


V2, V1 = "0::/a/b\n", "9:memory:/m\n4:cpu,cpuacct:/a/b\n0::/x\n"


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        (V2, {}, 0),
        (V2, {"cpu.max": "max 100000", "a/b/cpu.max": "max 100000"}, 0),
        (V2, {"a/b/cpu.max": "150000 100000"}, 1.5),
        (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),  # in a container that sees its own group as the root
        ("0::/../elsewhere\n", {"cpu.max": "50000 100000"}, 0.5),
        (V2, {"a/b/cpu.max": "nonsense"}, 0),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, 0),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "70000", "cpu/cpu.cfs_period_us": "100000"}, 0.7),
        (V1, {"memory/m/cpu.cfs_quota_us": "70000", "memory/m/cpu.cfs_period_us": "100000"}, 0),
        (None, {"cpu.max": "50000 100000"}, 0),
    ],
)
def test_quota(tmp_path: Path, groups, files, cpus):
    _C = pytest.importorskip("alitok_fast._C")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert _C.cpu_quota(str(tmp_path)) == cpus


def test_usable_cpus_obey_the_affinity():
    _C = pytest.importorskip("alitok_fast._C")
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    assert 1 <= _C.usable_cpus() <= len(os.sched_getaffinity(0))
