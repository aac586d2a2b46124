"""The generator's weights rounded and laid out for `decode`, and back again."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast.ops.quantized_linear import GROUP_INPUTS, rounded_up_to_bfloat16

PANEL_OUTPUTS = 32
DEPTH_MULTIPLE = 64
OFFSET = 32768  # the kernel's unsigned activations exceed the signed ones by this number
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class LayerWeights:
    """One block of the generator: matrices (outputs, inputs), norms and biases as vectors."""

    norm1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    q_norm: Tensor
    k_norm: Tensor
    proj: Tensor
    proj_bias: Tensor
    norm2: Tensor
    w1: Tensor
    w3: Tensor
    w2: Tensor

    @property
    def vectors(self) -> list[Tensor]:
        return [self.norm1, self.qkv_bias, self.q_norm, self.k_norm, self.proj_bias, self.norm2]


@dataclass(frozen=True)
class PackedWeights:
    """The generator's weights in the order in which a step reads them (csrc/decode.h states the layout).

    Attributes:
        arena: uint8, all matrices in panels of 32 outputs.
        vectors: float32, all norms and biases.
        embeddings: (vocabulary, width) float32.
        rope: (positions, head_dim / 2, 2) float32.
        dtype: of the matrices: float32, bfloat16, or int8 with a bfloat16 scale for each output and 64 inputs
            (docs/precision.md). The head of an int8 generator is bfloat16.
        activation_dtype: what enters those matrices: float32, bfloat16, and for int8 ones int16, with a scale for each
            row, or int8, with one for each 64 inputs.
        hidden: width inside the MLP.
        codes: number of logits.
        norm_eps: added to the mean squares.
    """

    arena: Tensor
    vectors: Tensor
    embeddings: Tensor
    rope: Tensor
    dtype: torch.dtype
    activation_dtype: torch.dtype
    hidden: int
    codes: int
    norm_eps: float

    @property
    def step_bytes(self) -> int:
        """Weights that every step reads."""
        return self.arena.nbytes + self.vectors.nbytes


def pack_weights(
    layers: Sequence[LayerWeights],
    norm: Tensor,
    head: Tensor,
    head_bias: Tensor,
    embeddings: Tensor,
    rope: Tensor,
    dtype: torch.dtype,
    norm_eps: float = 1e-5,
    activation_dtype: torch.dtype | None = None,
) -> PackedWeights:
    """Round the matrices to `dtype`, and lay them out for streaming through `decode`.

    Args:
        layers: the blocks of the generator.
        norm: (width,), the weight of the last norm.
        head: (codes, width), the output matrix.
        head_bias: (codes,), its bias.
        embeddings: (vocabulary, width).
        rope: (positions, head_dim / 2, 2) float32.
        dtype: float32, bfloat16 or int8.
        norm_eps: added to the mean squares.
        activation_dtype: of int8 matrices int16 or int8; None is int16, and `dtype` for other matrices.

    Returns:
        PackedWeights: a copy; later changes of the weights do not reach it.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or int8, got {str(dtype).removeprefix('torch.')}")
    own = torch.int16 if dtype == torch.int8 else dtype
    activation_dtype = activation_dtype or own
    if activation_dtype not in (own, dtype):
        expected, given, got = (str(x).removeprefix("torch.") for x in (own, dtype, activation_dtype))
        expected = "int16 or int8" if dtype == torch.int8 else expected
        raise ValueError(f"activation_dtype: expected {expected} with weights in {given}, got {got}")
    matrices, vectors = [], []
    for layer in layers:
        gate = _interleave(layer.w1, layer.w3)
        matrices += [_pack(matrix, dtype) for matrix in (layer.qkv, layer.proj, gate, layer.w2)]
        vectors += layer.vectors
    matrices.append(_pack(head, _head_dtype(dtype)))
    return PackedWeights(
        arena=_in_huge_pages(torch.cat(matrices)),
        vectors=torch.cat([v.detach().float() for v in (*vectors, norm, head_bias)]),
        embeddings=embeddings.detach().float().contiguous(),
        rope=rope,
        dtype=dtype,
        activation_dtype=activation_dtype,
        hidden=layers[0].w2.shape[1],
        codes=head.shape[0],
        norm_eps=norm_eps,
    )


def unpack_weights(
    weights: PackedWeights, heads: int, head_dim: int
) -> tuple[list[LayerWeights], Tensor, Tensor, Tensor]:
    """The layers, the last norm, the head and its bias as float32: exactly the numbers that the arena stands for."""
    width, hidden, dtype = heads * head_dim, weights.hidden, weights.dtype
    arena, vectors = _Reader(weights.arena), _Reader(weights.vectors)
    count = (len(weights.vectors) - width - weights.codes) // (6 * width + 2 * head_dim)
    layers = []
    for _ in range(count):
        norm1, qkv_bias, q_norm, k_norm, proj_bias, norm2 = vectors.take(
            width, 3 * width, head_dim, head_dim, width, width
        )
        qkv, proj = _unpack(arena, 3 * width, width, dtype), _unpack(arena, width, width, dtype)
        w1, w3 = _unpack(arena, 2 * _round_up(hidden, PANEL_OUTPUTS // 2), width, dtype).unflatten(
            0, (-1, 2, PANEL_OUTPUTS // 2)
        ).transpose(0, 1).flatten(1, 2)[:, :hidden]  # fmt: skip
        w2 = _unpack(arena, width, hidden, dtype)
        layers.append(LayerWeights(norm1, qkv, qkv_bias, q_norm, k_norm, proj, proj_bias, norm2, w1, w3, w2))
    head = _unpack(arena, weights.codes, width, _head_dtype(dtype))
    return layers, *vectors.take(width), head, *vectors.take(weights.codes)


class _Reader:
    def __init__(self, data: Tensor) -> None:
        self.data, self.at = data, 0

    def take(self, *sizes: int) -> Iterator[Tensor]:
        parts = self.data[self.at : self.at + sum(sizes)].split(sizes)
        self.at += sum(sizes)
        return iter(parts)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _head_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.int8 else dtype


def _interleave(w1: Tensor, w3: Tensor) -> Tensor:
    """Half a panel of w1, half a panel of w3, and so on, so that a thread meets both factors of SwiGLU together."""
    half = PANEL_OUTPUTS // 2
    padding = _round_up(len(w1), half) - len(w1)
    pair = [F.pad(w.detach(), (0, 0, 0, padding)).unflatten(0, (-1, half)) for w in (w1, w3)]
    return torch.stack(pair, 1).flatten(0, 2)


def _pack(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs) as the bytes of its panels."""
    outputs, inputs = matrix.shape
    padding = (0, _round_up(inputs, DEPTH_MULTIPLE) - inputs, 0, _round_up(outputs, PANEL_OUTPUTS) - outputs)
    panels = F.pad(matrix.detach().float(), padding).unflatten(0, (-1, PANEL_OUTPUTS))
    if dtype != torch.int8:
        return grouped_by_four_bytes(panels.to(dtype)).flatten()
    groups = panels.unflatten(-1, (-1, GROUP_INPUTS)).transpose(1, 2)  # (panels, groups, outputs, inputs)
    scale = rounded_up_to_bfloat16(groups.abs().amax(-1) / 127)
    whole = (groups / torch.where(scale > 0, scale, 1.0).float().unsqueeze(-1)).round()
    data = grouped_by_four_bytes(whole.to(torch.int8)), scale.view(torch.uint8)
    offset = (OFFSET * (whole.sum(-1).double() * scale.double()).sum(1)).float()
    return torch.cat([torch.cat(data, -1).flatten(1), offset.view(torch.uint8)], 1).flatten()


def _unpack(arena: _Reader, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    count, depth = _round_up(outputs, PANEL_OUTPUTS) // PANEL_OUTPUTS, _round_up(inputs, DEPTH_MULTIPLE)
    if dtype != torch.int8:
        (data,) = arena.take(count * PANEL_OUTPUTS * depth * dtype.itemsize)
        panels = one_output_a_row(data.view(count, -1), dtype).float()
    else:
        weights, scales = PANEL_OUTPUTS * GROUP_INPUTS, 2 * PANEL_OUTPUTS
        sizes = [depth // GROUP_INPUTS * (weights + scales), 4 * PANEL_OUTPUTS]
        (data,) = arena.take(count * sum(sizes))
        groups = data.view(count, -1).split(sizes, 1)[0].unflatten(1, (-1, weights + scales))
        whole, scale = groups.split([weights, scales], -1)
        scaled = one_output_a_row(whole, dtype) * scale.contiguous().view(torch.bfloat16).float().unsqueeze(-1)
        panels = scaled.transpose(1, 2).flatten(2)
    return panels.flatten(0, 1)[:outputs, :inputs]


def grouped_by_four_bytes(weights: Tensor) -> Tensor:
    """(..., outputs, inputs) as bytes (..., -1), with four of each output together."""
    fours = weights.unflatten(-1, (-1, 4 // weights.element_size())).transpose(-3, -2)
    return fours.contiguous().view(torch.uint8).flatten(-3)


def one_output_a_row(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `grouped_by_four_bytes` for one panel or group of it."""
    fours = data.contiguous().view(dtype).unflatten(-1, (-1, PANEL_OUTPUTS, 4 // dtype.itemsize))
    return fours.transpose(-3, -2).flatten(-2)


HUGE_PAGE = 2**21


def _in_huge_pages(data: Tensor) -> Tensor:
    """A copy in memory that asks for 2 MiB pages: a step walks through all of it and would often miss the TLB."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return data.clone()
    memory = mmap.mmap(-1, data.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + data.nbytes].copy_(data)
