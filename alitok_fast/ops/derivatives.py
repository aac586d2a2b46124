"""Derivatives that operators do not have: each is refused in words, none is a wrong number.

torch answers a derivative that an operator of `torch.library` lacks with zeros and at most a warning: forward mode
(`torch.func.jvp`, `torch.autograd.forward_ad`) for all of them, reverse mode for those without a formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from alitok_fast._library import register_autograd

Kind = torch._C._functorch.TransformType


def refuse_transforms(
    operator: str, /, advice: str = "use torch.autograd.grad or use_reference()", **tensors: Tensor | None
) -> None:
    """Refuse forward-mode derivatives, and those of `torch.func`, with respect to any of the tensors.

    Under torch.compile and torch.export tangents cannot be seen, so that any use of forward mode is refused; torch
    itself refuses the derivatives of `torch.func` there.

    Raises:
        RuntimeError: naming the operator, the argument and what to use instead.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"{operator}: expected no forward-mode derivative in a compiled function; {advice}")
        return
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if forward_ad._current_level < 0 and not transforms:
        return
    kinds = {transform.level(): transform.key() for transform in transforms}
    vmapped = Kind.Vmap in kinds.values()
    for name, tensor in tensors.items():
        for layer in () if tensor is None else _layers(tensor):
            kind = kinds.get(torch._C._functorch.maybe_get_level(layer))
            if kind == Kind.Grad and layer.requires_grad:
                raise RuntimeError(f"{operator}: expected no torch.func derivative of {name}, got one; {advice}")
            if _has_tangent(layer, kind, vmapped):
                raise RuntimeError(f"{operator}: expected no forward-mode derivative of {name}, got one; {advice}")


def _has_tangent(layer: Tensor, kind: Kind | None, vmapped: bool) -> bool:
    """Whether a forward-mode derivative is carried by a tensor of this kind of transform; None is of no transform."""
    if kind is None:
        with torch._C._DisableFuncTorch():
            return forward_ad.unpack_dual(layer).tangent is not None
    if vmapped:  # there torch cannot look for the tangent: everything that torch.func.jvp has wrapped counts
        return kind == Kind.Jvp
    return forward_ad.unpack_dual(layer).tangent is not None


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, and what the transforms of torch.func have wrapped in it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def refuse_gradients(operator: str, /, advice: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that require a gradient where one would be recorded.

    Raises:
        RuntimeError: naming the operator, the argument and the advice.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{operator}: expected inputs without gradients, or torch.no_grad(), got {name} that requires one; "
                f"{advice}"
            )


def differentiated_once(operator: str) -> None:
    """Make the derivative of `alitok::<operator>_backward` an error that says so."""

    def backward(ctx, *_):
        raise RuntimeError(
            f"{operator}: expected to be differentiated once, got a second time; use_reference() allows it"
        )

    register_autograd(f"{operator}_backward", backward, lambda ctx, inputs, output: None)
