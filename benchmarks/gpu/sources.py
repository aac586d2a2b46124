"""What a carried binary was made of, and where it lies. Needs nothing but Python."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build" / "gpu-wheel"
"""Where gpu/wheel.py packs a binary and the golden files."""
MANIFEST = "manifest.json"


def kernel_sources() -> str:
    """A fingerprint of everything that the extension is made of."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "csrc").iterdir(), ROOT / "CMakeLists.txt", ROOT / "alitok_fast" / "__init__.py"]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
