"""Ctrl-C, or a polite request to end (SIGTERM), between two steps instead of within one."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

_log = logging.getLogger(__name__)


class Interrupts:
    """Inside the block, the first Ctrl-C or SIGTERM only sets `seen`; a second one interrupts at once, as always.

    Python's signals reach the main thread alone: in others nothing changes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: object) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _log.warning("interrupted: this step is finished and saved first; press Ctrl-C again to leave at once")
