"""Where a packed copy of weights comes from: whether that module trains, and whether it has changed since."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class Origin:
    """A module that a copy was made of, without keeping it alive; a pickled or copied `Origin` has lost it."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._seen = None if module is None else _state(module)

    @property
    def module(self) -> nn.Module | None:
        """The module, None where it is gone."""
        return None if self._module is None else self._module()

    @property
    def training(self) -> bool:
        """Whether the module is in training mode now."""
        module = self.module
        return module is not None and module.training

    def changed(self) -> bool:
        """Whether weights of the module were written, exchanged or moved since this object was made.

        Writes are seen by torch's version counters: those through `tensor.data`, and into tensors made in inference
        mode, are not.
        """
        module = self.module
        return module is not None and _state(module) != self._seen

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (None,)


def _state(module: nn.Module) -> list[tuple[int, int]]:
    tensors = [*module.parameters(), *module.buffers()]
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
