"""The gate of a SwiGLU layer, silu(gate) * up, in one pass: one of the small kernels of a sampling step.

Training leaves this element-wise chain to torch.compile, which fuses it as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import check_one_device, check_tensors
from alitok_fast.ops.derivatives import refuse_transforms


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once.

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2, without the matrix products around
    it; the generator's layers use it (AliTok, arXiv 2506.05289, section 3).

    Devices: CPU and CUDA. The dtype of the result is that of `gate`, also under autocast.

    Gradients: with respect to both arguments, any number of times, by PyTorch's own operators. Forward-mode derivatives
    and those of `torch.func` are refused; `torch.vmap` runs the operator once per element.

    Args:
        gate: (...) float32, bfloat16 or float16, contiguous. Any shape, empty ones among them.
        up: of the shape, dtype and device of `gate`, contiguous.

    Returns:
        A new tensor of the shape and dtype of `gate`. NaN and infinities pass through as in `torch.nn.functional.silu`.

    Raises:
        TypeError: for an argument that is not a tensor.
        ValueError: for shapes, dtypes, strides or devices that do not fit. The message names the argument, what was
            expected and what was given.
        RuntimeError: for a derivative that the operator does not have.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(gate=gate, up=up)
    if not native_enabled():
        return swiglu_reference(gate, up)
    refuse_transforms("swiglu", gate=gate, up=up)
    return torch.ops.alitok.swiglu(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `swiglu`."""
    compute = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)


@register_fake("swiglu")
def _(gate, up):
    check_one_device(gate=gate, up=up)
    return torch.empty_like(gate)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    gate, up = ctx.saved_tensors
    gate, up, grad, dtype = gate.float(), up.float(), grad.float(), gate.dtype
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return (grad * up * slope).to(dtype), (grad * gate * sigmoid).to(dtype)


register_autograd("swiglu", _backward, _save_for_backward)
