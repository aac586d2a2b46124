"""torch.compile takes both models whole, forward and backward, and changes nothing."""

from __future__ import annotations

import pytest
import torch


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiled(model):
    # The graph capture and the operators' fake kernels and derivatives are what is tested; inductor's code is not ours.
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def assert_same(got, expected, tolerance=1e-4):
    assert got.keys() == expected.keys()
    for name in got:
        scale = expected[name].abs().max()
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale + 1e-7, name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_generator(tiny_generator, autocast, dropout):
    gen = tiny_generator(dropout=dropout, class_dropout=dropout).train()
    tokens = torch.randint(gen.config.codebook_size, (2, gen.config.num_tokens))
    labels = torch.tensor([1, 2])

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens, labels)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    expected = gradients(gen, loss(gen))
    got = gradients(gen, loss(compiled(gen)))
    if dropout == 0:  # else the compiled graph may draw in another order
        assert_same(got, expected, 5e-2 if autocast else 1e-4)
    else:
        assert got.keys() == expected.keys() and all(g.isfinite().all() for g in got.values())


def test_generator_without_gradient(tiny_generator):
    gen = tiny_generator()
    tokens = torch.randint(gen.config.codebook_size, (2, gen.config.num_tokens))
    with torch.no_grad():
        expected = gen(tokens, torch.tensor([1, 2]))
        torch.testing.assert_close(compiled(gen)(tokens, torch.tensor([1, 2])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_tokenizer(tiny_tokenizer, stage):
    model = tiny_tokenizer(stage=stage).train()
    size = model.config.image_size
    images = torch.rand(2, 3, size, size)

    def loss(model):
        output = model(images)
        aux = 0 if output.aux is None else output.aux.square().mean()
        return (output.reconstruction - images).square().mean() + output.vq.loss + aux

    expected = gradients(model, loss(model))
    assert_same(gradients(model, loss(compiled(model))), expected)
