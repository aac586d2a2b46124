"""What a pickle from elsewhere could do."""

from __future__ import annotations

from pathlib import Path


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
