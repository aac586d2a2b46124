"""Every operator with arguments of all kinds: the reference's result, or an error that names an argument.

A case is a call that is right, of random sizes, after up to three changes to its arguments: dtypes, devices, sizes,
strides, memory shared with another argument, indices out of range, numbers that are none, None. A crash ends the
process; `make sanitize` sees the rest of what may go wrong.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, PUBLIC, Case

ERRORS = (TypeError, ValueError, RuntimeError)  # NotImplementedError is a RuntimeError

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8,
    torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 31, 2**16, 2**31, 2**40, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-40, 0.5, 1.0, 1.5, 1e30, 1e300)
SIZES = (0, 1, 2, 3, 5, 8, 17, 64)
LARGE = (2**31, 2**40, 2**48, 2**62)


# ---- changes to one tensor: f(tensor, number, other tensors) ----


def to_dtype(t, n, others):
    return t.to(DTYPES[n % len(DTYPES)])


def to_meta(t, n, others):
    return t.to("meta")


def drop_dimension(t, n, others):
    return t.select(n % t.dim(), 0) if t.dim() and t.size(n % t.dim()) else t.unsqueeze(0)


def add_dimension(t, n, others):
    return t.unsqueeze(n % (t.dim() + 1))


def swap_dimensions(t, n, others):
    return t.transpose(n % t.dim(), n // 7 % t.dim()) if t.dim() else t


def resize(t, n, others):
    shape = list(t.shape) or [1]
    shape[n % len(shape)] = SIZES[n // 8 % len(SIZES)]
    return t.new_zeros(shape)


def expand(t, n, others):
    """Stride 0: of the same shape, or far larger than any memory."""
    if not t.dim() or not t.numel() or t.is_neg():  # the numbers of a negated view would be written out
        return t
    axis = n % t.dim()
    shape = list(t.shape)
    if n // 8 % 3 == 0:
        shape[axis] = LARGE[n // 32 % len(LARGE)]
    try:
        return t.narrow(axis, 0, 1).expand(shape)
    except RuntimeError:  # more elements than torch can count
        return t


def huge_and_empty(t, n, others):
    """Sizes that overflow in a product, and no element at all."""
    if t.dim() < 2:
        return t
    shape = [LARGE[(n + i) % len(LARGE)] if n >> i & 1 else size for i, size in enumerate(t.shape)]
    shape[n % t.dim()] = 0
    return t.new_zeros(1).as_strided(shape, [0] * t.dim())


def with_gaps(t, n, others):
    """The same numbers, further apart along each dimension."""
    if not t.dim() or max(t.shape) > 2**40:  # another change has made it far larger than any memory
        return t
    wide = t.new_zeros([size + size * (n >> i & 1) for i, size in enumerate(t.shape)])
    view = wide[tuple(slice(None, None, 2 if n >> i & 1 else 1) for i in range(t.dim()))]
    view.view(torch.uint8).copy_(t.view(torch.uint8)) if t.dtype == torch.float8_e4m3fn else view.copy_(t)
    return view


def misaligned(t, n, others):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def negated(t, n, others):
    return torch._neg_view(t) if t.is_floating_point() and t.dtype != torch.float8_e4m3fn else t


def shared(t, n, others):
    """In the memory of another argument, from some byte on."""
    other = others[n % len(others)]
    if not other.is_contiguous() or other.device != t.device or not t.numel():
        return t
    memory = other.flatten().view(torch.uint8)[n // 8 % 4 * 8 :]
    whole = len(memory) // t.element_size()
    if whole < t.numel():
        return t
    memory = memory[: whole * t.element_size()]
    if memory.storage_offset() % t.element_size():
        return t
    return memory.view(t.dtype)[: t.numel()].view(t.shape)


def odd_numbers(t, n, others):
    """Some elements not finite, huge or tiny; of integers, out of any range."""
    if t.dtype in (torch.bool, torch.float8_e4m3fn) or not t.numel():
        return t
    t = t.clone()
    values = NUMBERS if t.is_floating_point() else INTEGERS
    value = values[n // 64 % len(values)]
    if not t.is_floating_point() and not t.is_complex():
        info = torch.iinfo(t.dtype)
        value = max(info.min, min(info.max, value))
    t.view(-1)[n % t.numel() :: 1 + n // 8 % 5] = value
    return t


def nothing(t, n, others):
    return None


CHANGES = (
    to_dtype, to_meta, drop_dimension, add_dimension, swap_dimensions, resize, expand, huge_and_empty, with_gaps,
    misaligned, negated, shared, odd_numbers, odd_numbers, nothing,
)  # fmt: skip
FOR_PUBLIC = (to_dtype, resize, expand, huge_and_empty, with_gaps, misaligned, odd_numbers)
"""What a public function makes of None, of another type or of too few dimensions has tests of its own."""

VALUES_CHANGE = {odd_numbers, negated, shared, resize, expand}
"""Changes after which numbers may be too odd to compare, as those of two roundings."""


def change_scalar(value, n):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return INTEGERS[n % len(INTEGERS)]
    if isinstance(value, float):
        return NUMBERS[n % len(NUMBERS)]
    if isinstance(value, torch.dtype):
        return DTYPES[n % len(DTYPES)]
    return (None, 1, 0.5)[n % 3]


def change(case: Case, arguments: dict, which: int, how: int, n: int) -> bool:
    """Change one argument; whether the result can still be compared with the reference's number by number."""
    name = list(arguments)[which % len(arguments)]
    value = arguments[name]
    if not isinstance(value, torch.Tensor):
        arguments[name] = value if case.public else change_scalar(value, n)
        return False
    allowed = FOR_PUBLIC if case.public else CHANGES
    function = allowed[how % len(allowed)]
    if function is negated and case.written:
        return True  # torch itself does not manage
    others = [t for key, t in arguments.items() if isinstance(t, torch.Tensor) and key != name] or [value]
    without_numbers = value.device.type == "meta" or value.numel() > 2**20
    if without_numbers and function in (to_dtype, negated, shared, odd_numbers, with_gaps, misaligned):
        return True
    try:
        arguments[name] = function(value, n, others)
    except (RuntimeError, NotImplementedError):  # torch itself cannot make it
        return True
    return function not in VALUES_CHANGE


def clone(value):
    """Apart from every other argument, with the same numbers."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.numel() > 2**20:
        return value
    if any(size > 2**20 for size in value.shape):
        return value
    return value.resolve_neg().clone(memory_format=torch.contiguous_format)


def results(value) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def run_case(case: Case, sizes: tuple[int, ...], changes, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    arguments = case.make(sizes, generator)
    comparable = all([change(case, arguments, *one) for one in changes])
    copies = {name: clone(value) for name, value in arguments.items()}
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    devices = {t.device.type for t in tensors}
    try:
        got = case.call(arguments)
    except ERRORS as error:
        assert changes, f"a right call was refused: {error!r}"
        by_torch = not tensors or re.search("can't allocate memory|must be Tensor, not NoneType", str(error))
        named = re.search(rf"\b({'|'.join(arguments)})\b", str(error))
        assert case.public or by_torch or named, f"names no argument: {error!r}"
        return
    assert len(devices) == 1, f"arguments on {devices} were accepted"
    if devices == {"meta"}:
        assert all(t.device.type == "meta" for t in results(got))
        return
    expected = case.reference(copies)
    pairs = list(zip(results(got), results(expected), strict=True))
    pairs += [(arguments[name], copies[name]) for name in case.written if arguments[name] is not None]
    for actual, wanted in pairs:
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
        if comparable:
            case.compare(actual, wanted)


CHANGE = st.tuples(st.integers(0, 31), st.integers(0, len(CHANGES) - 1), st.integers(0, 2**12))


def cases(number: int):
    def decorate(test):
        return settings(
            max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )(
            given(
                sizes=st.tuples(*[st.integers(0, 9)] * 4),
                changes=st.lists(CHANGE, max_size=3),
                seed=st.integers(0, 2**32),
            )(test)
        )

    return decorate


ALL = pytest.mark.parametrize("case", [*CASES, *PUBLIC], ids=lambda case: case.name)


@ALL
@cases(50)
def test_operator(case, sizes, changes, seed):
    run_case(case, sizes, changes, seed)


@pytest.mark.slow
@ALL
@cases(500)
def test_operator_at_length(case, sizes, changes, seed):
    run_case(case, sizes, changes, seed)
