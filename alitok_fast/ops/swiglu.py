"""The gate of a SwiGLU layer, silu(gate) * up, in one pass, and its gradients in another."""

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

    Gradients: with respect to both arguments, any number of times; from the second on by PyTorch's own operators.
    Forward-mode derivatives and those of `torch.func` are refused; `torch.vmap` runs the operator once per element.

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


@register_fake("swiglu_backward")
def _(grad, gate, up):
    check_one_device(gate=gate, up=up, grad=grad)
    return torch.empty_like(gate), torch.empty_like(gate)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.alitok.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def _second_backward(ctx, grad_gate, grad_up):
    """Of grad up s (1 + gate (1 - s)) and grad gate s, with s = sigmoid(gate); by torch, which goes on from here."""
    grad, gate, up = (tensor.float() for tensor in ctx.saved_tensors)
    dtype, along_gate, along_up = ctx.saved_tensors[0].dtype, grad_gate.float(), grad_up.float()
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    curvature = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))
    of_grad = along_gate * up * slope + along_up * gate * sigmoid
    of_gate = grad * (along_gate * up * curvature + along_up * slope)
    return of_grad.to(dtype), of_gate.to(dtype), (along_gate * grad * slope).to(dtype)


register_autograd("swiglu", _backward, _save_for_backward)
register_autograd("swiglu_backward", _second_backward, _save_for_backward)
