"""Accumulation changes memory, nothing else: stage 1's clustering too is one update per step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.conftest import FIRST, TOKENIZER, TOKENIZER_TRAINING, batch_of

from alitok_fast.data import open_source
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.models.vector_quantizer import VectorQuantizer
from alitok_fast.training.clusters import clusters_of, update_codebook
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer


@pytest.fixture(scope="module")
def weights(idx_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """weights(parts, steps) -> state after so many steps of stage 1 in that many micro-batches."""

    def train(parts: int, steps: int) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp(f"parts{parts}")
        config = replace(TOKENIZER_TRAINING, steps=steps, batch_size=8, grad_accumulation=parts, lr=1e-5, warmup=0)
        config = replace(config, end_lr=1e-5)
        train_tokenizer(open_source(idx_folder, image_size=8), out, 1, TOKENIZER, config, progress=False)
        return torch.load(out / "checkpoint" / "state.pt", weights_only=True)["model"]

    return train


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_stage_1_in_parts_equals_the_whole(weights, parts: int) -> None:
    """After one step: later, codes that were drawn to one feature are so near that rounding chooses between them."""
    whole, split = weights(1, 1), weights(parts, 1)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=2.1e-5, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(split["quantize.embed_prob"], whole["quantize.embed_prob"], rtol=0, atol=0)
    usage = weights(parts, 6)["quantize.embed_prob"].double().sum()
    assert float(usage) == pytest.approx(1 - TOKENIZER.usage_decay**6, abs=1e-5)  # one update per step


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_one_update_over_the_parts_is_that_over_the_batch(parts: int) -> None:
    torch.manual_seed(0)
    one, two = (VectorQuantizer(TOKENIZER) for _ in range(2))
    z = torch.randn(12, TOKENIZER.code_dim).repeat(2, 1)[torch.randperm(24)]
    two.load_state_dict(one.state_dict())
    one.cluster_update(z, one(z))
    update_codebook(two, [clusters_of(part, two(part), two.codebook) for part in z.chunk(parts)])
    assert torch.equal(one.embed_prob, two.embed_prob)
    assert torch.equal(one.codebook, two.codebook)


def test_on_a_tie_the_first_micro_batch_counts() -> None:
    """Two features, equally far from codes at the origin, on opposite sides."""
    one, two = (VectorQuantizer(TOKENIZER) for _ in range(2))
    for quantizer in (one, two):
        torch.nn.init.zeros_(quantizer.embedding.weight)
    feature = torch.ones(1, TOKENIZER.code_dim)
    z = torch.cat([feature, -feature])
    one.cluster_update(z, one(z))
    update_codebook(two, [clusters_of(part, two(part), two.codebook) for part in z.chunk(2)])
    assert torch.equal(one.codebook, two.codebook) and bool((two.codebook >= 0).all())


def test_what_is_kept_between_the_calls_has_no_graph(idx_folder: Path) -> None:
    torch.manual_seed(0)
    task = TokenizerTask(Tokenizer(TOKENIZER), open_source(idx_folder, image_size=8), TOKENIZER_TRAINING)
    outputs = [task.loss(FIRST, *batch_of(task, index)) for index in range(2)]
    state = dict(vars(task))
    for output in outputs:
        assert not any(part.requires_grad for part in output.kept)
        assert output.kept.features.shape == (TOKENIZER.codebook_size, TOKENIZER.code_dim)
        output.loss.backward()
    before = task.model.quantize.codebook.detach().clone()
    task.after_backward(outputs)
    assert vars(task) == state and not torch.equal(before, task.model.quantize.codebook)
