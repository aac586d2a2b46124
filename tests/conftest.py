"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_ISAS = ("scalar", "avx2", "avx512", "amx")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference outputs: $ALITOK_GOLDEN, else ../shared/golden; skips where there is none."""
    folder = Path(os.environ.get("ALITOK_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden outputs in {folder} (set ALITOK_GOLDEN)")
    return folder


@pytest.fixture(params=CPU_ISAS)
def cpu_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, in turn; native operators use it for the length of the test."""
    from alitok_fast import _C

    best = "amx" if _C.detected_amx() else _C.detected_cpu_isa()
    if CPU_ISAS.index(request.param) > CPU_ISAS.index(best):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("ALITOK_CPU_ISA", request.param)
    return request.param
