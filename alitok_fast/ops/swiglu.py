"""silu(gate) * up in one pass: one of the small kernels of a sampling step.

Forward only: training leaves this element-wise chain to torch.compile, which fuses it as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32 and rounded once.

    Args:
        gate, up: of one shape and dtype (float32, bfloat16 or float16), contiguous.

    Returns:
        Of that shape and dtype.

    Raises:
        ValueError, RuntimeError: naming the argument, what was expected and what was given.
    """
    return (torch.ops.alitok.swiglu if native_enabled() else swiglu_reference)(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `swiglu`."""
    compute = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)


@register_fake("swiglu")
def _(gate, up):
    return torch.empty_like(gate)
