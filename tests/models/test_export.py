"""torch.export with a batch of any size: no length of a batch is frozen."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export


class Method(torch.nn.Module):
    """A method of a model as a module's forward."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


def exported(module, arguments, batch):
    shapes = tuple(None if argument is None else {0: batch} for argument in arguments)
    return export(module, arguments, dynamic_shapes=shapes).module()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["encode", "decode", "decode_rows"])
def test_tokenizer(tiny_tokenizer, stage, name):
    if name == "decode_rows" and stage == 2:
        pytest.skip("the causal decoder's")
    model = tiny_tokenizer(stage)
    inputs = torch.rand(5, 3, 16, 16) if name == "encode" else torch.randint(32, (5, 21))
    program = exported(Method(model, name), (inputs[:2],), Dim("batch", min=1, max=64))
    for batch in (1, 5):
        assert torch.equal(program(inputs[:batch]), getattr(model, name)(inputs[:batch]))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_pass(tiny_tokenizer, stage):
    class Pass(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_tokenizer(stage)

        def forward(self, images):
            output = self.model(images)
            return output.reconstruction, output.z, output.vq.indices

    module, images = Pass(), torch.rand(5, 3, 16, 16)
    program = exported(module, (images[:2],), Dim("batch", min=1, max=64))
    for got, expected in zip(program(images), module(images), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("conditional", [True, False])
def test_generator(tiny_generator, conditional):
    gen = tiny_generator()
    tokens, labels = torch.randint(32, (5, 21)), torch.arange(5)
    batch = Dim("batch", min=1, max=64)
    arguments = (tokens[:2], labels[:2] if conditional else None)
    program = exported(gen, arguments, batch)
    with torch.no_grad():
        for rows in (1, 5):
            given = labels[:rows] if conditional else None
            torch.testing.assert_close(program(tokens[:rows], given), gen(tokens[:rows], given))
