"""A linear layer in bfloat16 over float32 weights, forward and backward: the products of mixed-precision training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import _mode, detected_cpu_isa, native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import as_rows, check_one_device, check_optional_tensors, check_tensors, without_autocast
from alitok_fast.ops.derivatives import differentiated_once, refuse_transforms

FAST = detected_cpu_isa() == "avx512"
"""Whether this CPU multiplies bfloat16 faster than float32; a constant, which torch.compile may look at."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias with x and W rounded to bfloat16 and sums in float32.

    As torch.nn.functional.linear under bfloat16 autocast. The gradients of weight and bias are the float32 sums, where
    torch's are rounded to bfloat16 on their way.

    Source: mixed precision training (arXiv 1710.03740), for the layers of AliTok (arXiv 2506.05289).

    Devices: CPU. Autocast changes no dtype.

    Gradients: with respect to `x`, `weight` and `bias`, once; they are the same in every run and for every number of
    threads. Second derivatives, forward-mode derivatives and those of `torch.func` are refused. `torch.vmap` runs the
    operator once per element.

    Args:
        x: (..., inputs) bfloat16 or float32, on the CPU.
        weight: (outputs, inputs) float32 or bfloat16.
        bias: (outputs,) float32 or bfloat16, or None.

    Returns:
        (..., outputs) bfloat16.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes or devices that do not fit. The message names the argument, what was expected and
            what was given.
        RuntimeError: for a derivative that the operator does not have.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(x=x, weight=weight)
    check_optional_tensors(bias=bias)
    rows = as_rows("x", x)
    if rows.dtype == torch.float32:
        rows = rows.bfloat16()
    wide = bias.float() if bias is not None and bias.dtype == torch.bfloat16 else bias
    operator = linear_reference
    if native_enabled():
        refuse_transforms("linear", x=x, weight=weight, bias=bias)
        operator = torch.ops.alitok.linear
    out = operator(rows.contiguous(), weight.contiguous(), wide)
    return out.view(*x.shape[:-1], out.shape[1])


@without_autocast
def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of `linear` for (rows, inputs), x bfloat16, bias float32. With x float64 nothing is rounded."""
    if x.dtype == torch.float64:
        return F.linear(x, weight.double(), None if bias is None else bias.double())
    out = x.float() @ weight.bfloat16().float().T
    return (out if bias is None else out + bias).bfloat16()


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear; on a CPU that multiplies bfloat16, `linear` where autocast or the dtypes ask for it.

    Derivatives that `linear` does not have go to torch's function too.
    """
    if FAST and not _mode.reference and _in_bfloat16(x, weight) and not _transformed():
        return linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _in_bfloat16(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.ndim == 0:
        return False
    if torch.is_autocast_enabled("cpu"):
        floats = (torch.float32, torch.bfloat16)
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in floats and weight.dtype in floats
    return x.dtype == weight.dtype == torch.bfloat16


def _transformed() -> bool:
    """Whether forward mode or a transform of torch.func is active."""
    from torch.autograd import forward_ad

    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or bool(torch._C._functorch.get_interpreter_stack())


@register_fake("linear")
def _(x, weight, bias):
    check_one_device(x=x, weight=weight, bias=bias)
    return x.new_empty(x.shape[0], weight.shape[0])


@register_fake("linear_backward")
def _(grad, x, weight, wanted):
    check_one_device(x=x, grad=grad, weight=weight)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    return (
        x.new_empty(rows if wanted[0] else 0, inputs),
        x.new_empty(outputs if wanted[1] else 0, inputs, dtype=torch.float32),
        x.new_empty(outputs if wanted[2] else 0, dtype=torch.float32),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    gradients = torch.ops.alitok.linear_backward(grad.contiguous(), x, weight, wanted)
    grad_x, grad_weight, grad_bias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias


register_autograd("linear", _backward, _save_for_backward)
differentiated_once("linear")
