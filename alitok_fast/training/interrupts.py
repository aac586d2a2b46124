"""Ctrl-C between two steps instead of within one."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

_log = logging.getLogger(__name__)


class Interrupts:
    """Inside the block, the first Ctrl-C only sets `seen`; a second one interrupts at once, as always.

    Python's signals reach the main thread alone: in others nothing changes.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, number: int, frame: object) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _log.warning("interrupted: this step is finished and saved first; press Ctrl-C again to leave at once")
