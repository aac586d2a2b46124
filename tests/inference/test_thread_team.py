"""release_threads: a thread's team of OpenMP threads ends, and the next computation makes another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, threading, time, torch
from alitok_fast.inference.thread_team import release_threads

def count(expected):
    ends = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) != expected and time.monotonic() < ends:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

def compute():
    return float(torch.ones(1 << 20).exp().sum())

before = len(os.listdir("/proc/self/task"))
value = compute()
with_team = len(os.listdir("/proc/self/task"))
released = release_threads()
without = count(before)
again = compute()
print(before, with_team, released, without, again == value, len(os.listdir("/proc/self/task")))
inside = []
def other():
    compute()
    release_threads()
    inside.append(count(with_team + 1))
thread = threading.Thread(target=other)
thread.start()
thread.join()
print(inside[0], count(with_team))
"""


def test_a_team_ends_and_is_made_again():
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted under /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    before, with_team, released, without, same, again = first.split()
    if released == "False":
        pytest.skip("this torch has no OpenMP library that is found")
    assert int(with_team) == int(before) + 1 and without == before
    assert same == "True" and again == with_team
    assert second.split() == [str(int(with_team) + 1), with_team], "the other thread alone, then nobody's"
