"""A tokenizer's encoder or decoder with int8 products, for the CPU."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from alitok_fast.models.tokenizer import Decoder, Encoder
from alitok_fast.ops.int8_linear import int8_linear, pack_int8

Half = TypeVar("Half", Encoder, Decoder)


class Int8Linear(nn.Module):
    """A linear layer by `int8_linear`: weights and inputs rounded to int8 by groups of 64, results in bfloat16."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        self.register_buffer("weight", pack_int8(linear.weight))
        self.register_buffer("bias", linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.bias, self.outputs, torch.bfloat16)


def int8_twin(half: Half) -> Half:
    """A copy whose transformer multiplies in int8 and attends in bfloat16, around a float32 residual stream."""
    twin = copy.deepcopy(half).float()
    for layer in twin.transformer:
        parts: list[nn.Module] = [layer.get_submodule("attn"), layer.get_submodule("mlp")]
        for module in parts:
            for name, child in list(module.named_children()):
                assert isinstance(child, nn.Linear)
                setattr(module, name, Int8Linear(child))
    return twin
