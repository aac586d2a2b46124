"""check_plain: whatever makes `model(...)` differ from its weights is refused by name, with what to do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from alitok_fast.models import load_generator, load_tokenizer
from alitok_fast.models.checks import check_finite, check_plain, check_range
from alitok_fast.models.generator import Generator


class Lora(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(inner.in_features, 2), nn.Linear(2, inner.out_features)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


class LinearWithAdapter(nn.Linear):
    pass


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Loud(Generator):
    def forward(self, tokens, labels):
        return 2 * super().forward(tokens, labels)


class Scaled(torch.Tensor):
    pass


def lora(gen):
    gen.blocks[1].attn.qkv = Lora(gen.blocks[1].attn.qkv)


def subclass(gen):
    gen.blocks[0].mlp.w1.__class__ = LinearWithAdapter


def hook(gen):
    gen.blocks[0].norm1.register_forward_hook(lambda module, inputs, output: output * 2)


def pre_hook(gen):
    gen.register_forward_pre_hook(lambda module, inputs: inputs)


def own_forward(gen):
    gen.blocks[0].mlp.forward = lambda x: x


def own_part(gen):
    gen.blocks[0].attn.project = lambda x: x


def parametrized(gen):
    nn.utils.parametrize.register_parametrization(gen.output, "weight", Doubled())


def spectral(gen):
    nn.utils.parametrizations.spectral_norm(gen.blocks[0].attn.proj)


def pruned(gen):
    prune.l1_unstructured(gen.blocks[0].mlp.w2, "weight", amount=0.5)


def weight_normed(gen):
    nn.utils.weight_norm(gen.output)


def extra_parameter(gen):
    gen.blocks[0].attn.register_parameter("scale", nn.Parameter(torch.ones(1)))


def extra_buffer(gen):
    gen.register_buffer("shift", torch.zeros(1))


def extra_module(gen):
    gen.blocks[0].adapter = nn.Linear(4, 4)


def without_bias(gen):
    gen.output.bias = None


def fewer_blocks(gen):
    del gen.blocks[1]


def other_heads(gen):
    gen.blocks[0].attn.num_heads = 1


def other_shape(gen):
    gen.norm.weight = nn.Parameter(torch.ones(1))


def tensor_subclass(gen):
    gen.output.weight = nn.Parameter(gen.output.weight.data.as_subclass(Scaled))


def compiled_part(gen):
    gen.blocks[0] = torch.compile(gen.blocks[0], backend="eager")


CHANGES = {
    lora: "blocks.1.attn.qkv: expected a Linear, got a Lora, .*merge or remove adapters",
    subclass: "blocks.0.mlp.w1: expected a Linear, got a LinearWithAdapter",
    hook: r"blocks.0.norm1: expected no forward hooks, got some, .*remove them \(handle.remove\(\)",
    pre_hook: "model: expected no forward hooks, got some",
    own_forward: "blocks.0.mlp: expected the forward of its class, got another one, .*delete the attribute forward",
    own_part: "blocks.0.attn: expected the project of its class, got another one",
    parametrized: "output: expected a Linear, got a ParametrizedLinear, .*remove_parametrizations",
    spectral: "blocks.0.attn.proj: expected a Linear, got a ParametrizedLinear",
    pruned: "blocks.0.mlp.w2: expected no forward hooks, got some, .*prune.remove",
    weight_normed: "output: expected no forward hooks, got some",
    extra_parameter: "blocks.0.attn.scale: expected nothing, got a tensor, .*merge or remove adapters",
    extra_buffer: "model.shift: expected nothing, got a tensor",
    extra_module: "blocks.0.adapter: expected no such module, got one",
    without_bias: "output.bias: expected a plain tensor, got NoneType",
    fewer_blocks: "blocks.1: expected a GeneratorBlock, got none",
    other_heads: "blocks.0.attn.num_heads: expected 2, got 1",
    other_shape: r"norm.weight: expected \(32,\), got \(1,\)",
    tensor_subclass: "output.weight: expected a plain tensor, got",
    compiled_part: "blocks.0: expected a GeneratorBlock, got a OptimizedModule, .*_orig_mod",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_generator_is_refused(tiny_generator, change):
    gen = tiny_generator()
    check_plain(gen)
    change(gen)
    with pytest.raises(ValueError, match=CHANGES[change]) as caught:
        check_plain(gen)
    assert len(str(caught.value).splitlines()) == 1


def test_what_changes_nothing_is_taken(tiny_generator, tiny_tokenizer):
    gen = tiny_generator(dropout=0.1).train()
    gen.dropout.p = 0.0
    gen.requires_grad_(False)
    gen.blocks[0].register_full_backward_hook(lambda *_: None)
    gen.note, gen.step = "mine", lambda ids, cache: None
    gen.output.weight.note = "mine"
    gen.blocks[0].attn.k_norm.weight = gen.blocks[0].attn.q_norm.weight
    for model in (gen, copy.deepcopy(gen).to(torch.bfloat16), tiny_tokenizer(1), tiny_tokenizer(2)):
        check_plain(model)
    gen.compile(backend="eager")
    check_plain(gen)
    check_plain(load_generator("demo"))
    check_plain(load_tokenizer("demo"))


def test_a_changed_tokenizer_is_refused(tiny_tokenizer):
    model = tiny_tokenizer()
    model.decoder.ln_pre.eps = 1e-3
    with pytest.raises(ValueError, match="decoder.ln_pre.eps: expected 1e-05, got 0.001"):
        check_plain(model)
    model = tiny_tokenizer()
    model.decoder.ffn.append(nn.Identity())
    with pytest.raises(ValueError, match="decoder.ffn.1: expected no such module, got one"):
        check_plain(model)


def test_other_modules_are_refused(tiny_generator):
    gen = tiny_generator()
    for other in (torch.compile(gen, backend="eager"), nn.Linear(2, 2), Loud(gen.config)):
        with pytest.raises(ValueError, match=f"expected a Generator or Tokenizer itself, got {type(other).__name__}"):
            check_plain(other)


def test_hooks_for_all_modules_are_refused(tiny_generator):
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(ValueError, match="model: expected no hooks for all modules, got some"):
            check_plain(tiny_generator())
    finally:
        handle.remove()
    check_plain(tiny_generator())


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.tensor([0.5, 1.0000001]), "values: expected values in [0, 1], got 1.00000012"),
        (torch.tensor([1 + 1e-12], dtype=torch.float64), "values: expected values in [0, 1], got 1.000000000001"),
        (torch.tensor([1.5]), "values: expected values in [0, 1], got 1.5"),
        (torch.tensor([1234567]), "values: expected values in [0, 1], got 1234567"),
    ],
)
def test_a_value_just_outside_shows_its_digits(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_range("values", value, 0, 1, closed=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match=f"x: expected finite values, got {value}"):
        check_finite("x", torch.tensor([0.0, value]))
    check_finite("x", torch.zeros(0))
