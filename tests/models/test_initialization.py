"""A new tokenizer begins as a transform coder: its latent tokens find their patches before the first step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from alitok_fast.config import TokenizerConfig
from alitok_fast.models import Tokenizer
from alitok_fast.models.initialization import initialize_with_noise, photograph_cosines, place_codes, places_of_tokens

SMALL = TokenizerConfig(
    image_size=64, patch_size=8, codebook_size=1024, encoder_width=64, encoder_layers=3, encoder_heads=2,
    decoder_width=96, decoder_layers=2, decoder_heads=3, num_buffer_tokens=4, stage=1,
)  # fmt: skip


def made(config: TokenizerConfig = SMALL, seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(config).eval()


def clouds(count: int, size: int = 64) -> Tensor:
    """Pictures whose spectrum falls as that of photographs does, (count, 3, size, size) in [0, 1]."""
    rng = torch.Generator().manual_seed(1)
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)).clamp(min=1 / size)
    waves = torch.fft.irfft2(torch.fft.rfft2(torch.randn(count, 3, size, size, generator=rng)) / frequency)
    grey, colour = waves[:, :1], waves
    picture = grey / grey.std() + 0.3 * colour / colour.std()
    return (0.45 + 0.2 * picture).clamp(0, 1)


def flat_tiles(images: Tensor, patch: int) -> float:
    """The mean squared error of the mean colour of each patch."""
    mean = torch.nn.functional.avg_pool2d(images, patch)
    return (images - mean.repeat_interleave(patch, 2).repeat_interleave(patch, 3)).square().mean().item()


@torch.no_grad()
def errors(model: Tokenizer, images: Tensor) -> tuple[float, float]:
    """Mean squared errors of the reconstruction, without and with the quantizer."""
    without = model.decoder(model.features(images))[0]
    return tuple((out - images).square().mean().item() for out in (without, model(images).reconstruction))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stage": 2},
        {"patch_size": 4},
        {"encoder_width": 256, "encoder_heads": 4, "decoder_width": 256, "decoder_heads": 4},
        {"encoder_layers": 12, "decoder_layers": 12},
        {"code_dim": 16},
        {"code_dim": 64, "encoder_width": 128},
    ],
    ids=str,
)
def test_first_reconstruction_beats_flat_tiles(change):
    config, images = replace(SMALL, **change), clouds(4)
    without, _ = errors(made(config), images)
    assert without < 0.8 * flat_tiles(images, config.patch_size)


def test_first_reconstruction_of_photographs(golden):
    with np.load(golden / "tokenizer.npz") as outputs:
        photos = torch.from_numpy(outputs["photos"]).permute(0, 3, 1, 2).float() / 255
    small = torch.nn.functional.interpolate(photos, size=64, mode="bicubic", antialias=True).clamp(0, 1)
    without, quantized = errors(made(), small)
    assert without < 0.5 * flat_tiles(small, 8)
    assert quantized < 0.03


def test_pieces_of_the_codebook_are_in_use_at_once():
    model = made()
    with torch.no_grad():
        used = model(clouds(16)).vq.usage.count_nonzero().item()
    assert used > SMALL.codebook_size / 3


@torch.no_grad()
def test_each_token_codes_its_own_patch():
    model, images = made(), clouds(1)
    before, grid, p = model.features(images)[0], SMALL.grid, SMALL.patch_size
    for place in (0, 3, 37, grid**2 - 1):
        row, column = divmod(place, grid)
        changed = images.clone()
        changed[..., row * p : row * p + p, column * p : column * p + p] += 0.3
        moved = (model.features(changed)[0] - before).norm(dim=1)
        own = [token for token, at in enumerate(places_of_tokens(grid, SMALL.num_prefix_tokens)) if at == place]
        others = [token for token in range(SMALL.num_tokens) if token not in own]
        assert moved[own].min() > 5 * moved[others].max()


@torch.no_grad()
@pytest.mark.parametrize("stage", [1, 2])
def test_each_code_paints_its_own_patch(stage):
    model = made(replace(SMALL, stage=stage))
    codes = model.features(clouds(1))
    before, grid, p = model.decoder(codes)[0], SMALL.grid, SMALL.patch_size
    for place in (0, 29, grid**2 - 1):
        changed = codes.clone()
        changed[:, SMALL.num_prefix_tokens + place] *= -1
        moved = (model.decoder(changed)[0] - before).square()
        moved = torch.nn.functional.avg_pool2d(moved.mean(1, keepdim=True), p).flatten()
        assert moved.argmax() == place
        assert moved[place] > 0.9 * moved.sum()


@torch.no_grad()
def test_aux_head_paints_the_first_row():
    model, images = made(), clouds(4)
    aux = model.decoder(model.features(images))[1]
    p = SMALL.patch_size
    target = torch.cat([images[:, :, :p, :p], images[:, :, :p]], dim=3)
    assert (aux - target).square().mean() < 0.8 * flat_tiles(images, p)


@torch.no_grad()
def test_noise_ties_no_token_to_a_patch():
    model, images = made(), clouds(1)
    initialize_with_noise(model)
    before, p = model.features(images)[0], SMALL.patch_size
    changed = images.clone()
    changed[..., :p, :p] += 0.3
    moved = (model.features(changed)[0] - before).norm(dim=1)
    own = [token for token, at in enumerate(places_of_tokens(SMALL.grid, SMALL.num_prefix_tokens)) if at == 0]
    assert 0 < moved[own].mean() < 2 * moved.mean()
    assert errors(model, images)[0] > 0.9 * images.var().item()
    assert 0 < model.quantize.codebook.abs().max() <= 1 / SMALL.codebook_size


def test_noise_in_a_decoder_leaves_the_rest():
    torch.manual_seed(0)
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize_with_noise(model.decoder)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "decoder.decoder_embed.weight" in moved and all(name.startswith("decoder.") for name in moved)


def test_seed_decides_the_weights():
    first, second, other = (made(seed=seed).state_dict() for seed in (3, 3, 4))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name in (
        "latent_tokens",
        "encoder.patch_embed.weight",
        "decoder.decoder_embed.weight",
        "quantize.embedding.weight",
    ):
        assert not torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype):
    expected = made()
    torch.set_default_dtype(dtype)
    try:
        model = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("width, heads", [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (8, 1), (16, 2), (24, 1), (40, 5)])
@pytest.mark.parametrize("stage", [1, 2])
def test_any_sizes(width, heads, stage):
    for grid, code_dim in ((1, 4), (2, 40), (5, 3)):
        config = TokenizerConfig(
            image_size=2 * grid, patch_size=2, codebook_size=4, code_dim=code_dim, encoder_width=width,
            encoder_layers=1, encoder_heads=heads, decoder_width=width, decoder_layers=1, decoder_heads=heads,
            num_buffer_tokens=2, stage=stage,
        )  # fmt: skip
        model = made(config)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        if width // heads % 8 == 0:  # what attention takes
            assert model(torch.rand(1, 3, 2 * grid, 2 * grid)).reconstruction.isfinite().all()


def test_codes_of_places():
    codes = place_codes(8, 64)
    assert codes.shape == (64, 64)
    torch.testing.assert_close(codes.square().mean(1), torch.ones(64))
    likeness = codes @ codes.T / 64
    nearest = likeness.fill_diagonal_(-1).argmax(1)
    place = torch.arange(64)
    apart = (place // 8 - nearest // 8).abs() + (place % 8 - nearest % 8).abs()
    assert (likeness < 0.9).all() and (apart <= 2).all()


def test_places_of_tokens():
    row, image = [0, 1, 2], list(range(9))
    assert places_of_tokens(3, 4) == [0, *row, *image]
    assert places_of_tokens(3, 6) == [0, 0, 0, *row, *image]
    assert places_of_tokens(3, 2) == [0, 1, *image]
    assert places_of_tokens(3, 0) == image


def test_cosines_are_orthonormal_and_the_strongest_come_first():
    cosines, deviations = photograph_cosines(8, 192)
    rows = cosines.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(192), atol=1e-5, rtol=0)
    assert (deviations.diff() <= 0).all()
    assert cosines[0].std() < 1e-6  # grey, constant


def test_spectrum_is_that_of_photographs(golden):
    """Predicted deviations are within a factor of 2.5 of those of three photographs."""
    with np.load(golden / "tokenizer.npz") as outputs:
        photos = torch.from_numpy(outputs["photos"]).permute(0, 3, 1, 2).float() / 255
    small = torch.nn.functional.interpolate(photos, size=64, mode="bicubic", antialias=True).clamp(0, 1)
    cosines, deviations = photograph_cosines(8, 32)
    found = torch.nn.functional.conv2d(small, cosines, stride=8).std((0, 2, 3))
    assert ((found / deviations).log2().abs() < 2).all()
