"""How a new tokenizer begins: as a transform coder of photographs, which training then improves.

With all weights random, latent tokens and decoder positions must first find their patches by attention, and thousands
of steps give no more than tiles of flat colour (docs/training.md). So the weights begin near a model that works:

- *Where and what.* The first half of the channels says where a token is, the second half what is there. A patch, the
  latent token that stands for it and that token in the decoder share one two-dimensional sinusoidal code.
- *Fetching.* In the encoder's first layer queries and keys compare places, and values and output copy content, so that
  each latent token fetches its own patch ("mimetic" initialization, arXiv 2305.09828). Other layers add little yet.
- *A transform coder.* A token's features begin as the strongest cosines of its patch, in luma and two colour
  differences (the transform of JPEG), the decoder's heads as their inverse, and the codebook as draws from the spectrum
  of photographs.

Nothing else knows of this: names, shapes and the forward pass are those of the released checkpoints.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alitok_fast.models.layers import SelfAttention, TokenizerLayer

STD = 0.02  # of what begins as noise

# Photographs with pixels in [0, 1]: their mean, and the standard deviations of a patch's cosines per pixel of its side,
# in luma and two colour differences: of the constants, and of patterns with one half period. Those with n have 1 / n.
MEAN = 0.45
CONSTANTS, PATTERNS = (0.34, 0.17, 0.068), (0.09, 0.027, 0.0108)

CONTENT = 0.3  # rms of the channels that say what, where those that say where have 1
FEATURES = 0.6  # rms of the features: codes are too slow to follow much larger ones, and lose much smaller ones
MATCH = 32.0  # logit of a query and the key of its place

# On the CPU and in float32 whatever torch's defaults are.
_randn = partial(torch.randn, dtype=torch.float32, device="cpu")
_tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")
_steps = partial(torch.arange, dtype=torch.float32, device="cpu")


@torch.no_grad()
def initialize(model: Any) -> None:
    """Draw the weights of a new `Tokenizer`, in float32 and with values, from torch's generators.

    With fewer than 4 channels all are noise.
    """
    _draw_noise(model)
    if min(model.config.encoder_width, model.config.decoder_width) < 4:
        return
    code = PatchCode(model)
    _initialize_encoder(model.encoder, code)
    _initialize_decoder(model.decoder, code)
    codebook = model.quantize.codebook
    signs = 2.0 * torch.randint(2, (len(codebook), code.count), device="cpu") - 1
    laplace = signs.float() * torch.empty_like(signs, dtype=torch.float32).exponential_() / 2**0.5
    codebook.zero_()[:, : code.count].copy_(laplace * code.deviations * code.scale)


@torch.no_grad()
def initialize_with_noise(part: Any) -> None:
    """Draw the weights of a `Tokenizer`, or of its decoder alone, as small noise: nothing ties a token to a patch."""
    _draw_noise(part)
    if hasattr(part, "quantize"):
        codebook = part.quantize.codebook
        codebook.uniform_(-1 / len(codebook), 1 / len(codebook))


def _draw_noise(part: Any) -> None:
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in part.named_parameters():
        if name.endswith(("latent_tokens", "positional_embedding", "class_embedding")):
            nn.init.normal_(parameter, std=STD)
    decoder = getattr(part, "decoder", part)
    for half in (part.encoder, decoder) if decoder is not part else (decoder,):
        layers = _layers(half)
        for last in [linear for layer in layers for linear in (layer.attn.out_proj, layer.mlp.c_proj)]:
            last.weight.div_((2 * len(layers)) ** 0.5)
    for name in ("conv_out", "conv_out_aux"):  # the identity on colours
        if hasattr(decoder, name):
            nn.init.dirac_(getattr(decoder, name).weight)


class PatchCode:
    """What the features of a token begin as: `scale` times the `count` strongest cosines of its patch.

    `cosines` (count, 3, patch, patch) are orthonormal, `deviations` (count,) theirs in photographs. `places` are the
    patches that the tokens stand for.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        channels = min(config.encoder_width, config.decoder_width) // 2 - 1
        self.grid = config.grid
        self.places = places_of_tokens(config.grid, config.num_prefix_tokens)
        self.count = min(config.code_dim, 3 * config.patch_size**2, channels)
        self.cosines, self.deviations = photograph_cosines(config.patch_size, self.count)
        self.scale = FEATURES * (config.code_dim / self.deviations.square().sum()) ** 0.5

    def directions(self, channels: int) -> tuple[Tensor, Tensor]:
        """(channels, count) orthonormal columns of mean 0, which the mean of a LayerNorm leaves alone, and (count,) the
        factors with which the cosines along them give CONTENT: strong ones stay stronger than weak ones, but by less.
        """
        columns = _randn(channels, self.count)
        gains = self.deviations**-0.5
        gains *= CONTENT * (channels / (gains * self.deviations).square().sum()) ** 0.5
        return torch.linalg.qr(columns - columns.mean(0))[0], gains


def _initialize_encoder(encoder: Any, code: PatchCode) -> None:
    width = encoder.positional_embedding.shape[1]
    where, what = width // 2, width - width // 2
    first = _layers(encoder)[0].attn
    axes = _axes(code.grid, where, width // first.num_heads)
    mark = F.pad(axes[0] * where**0.5, (0, what))  # tells patches from the latent tokens, which share their places
    places = F.pad(place_codes(code.grid, where), (0, what))
    _add(encoder.positional_embedding, places + mark)
    _add(encoder.latent_token_positional_embedding, places[code.places])

    directions, gains = code.directions(what)
    weight, bias = encoder.patch_embed.parameters()
    weight.zero_()[where:].copy_(torch.einsum("dn,nchw->dchw", directions * gains, code.cosines))
    bias.copy_(-MEAN * weight.sum((1, 2, 3)))
    _fetch(first, axes, mark)

    # The rms of a patch at the first norm, and of a latent token that has fetched one at the last.
    patch = ((2 * where + what * CONTENT**2) / width) ** 0.5
    latent = (1 + what / width * (CONTENT / patch) ** 2) ** 0.5
    reading = (code.scale * patch * latent / gains)[:, None] * directions.T
    encoder.conv_out.weight.zero_()[: code.count, where:, 0, 0].copy_(reading)


def _axes(grid: int, width: int, most: int) -> Tensor:
    """(n <= most, width) orthonormal: a direction without a part in any code, then those in which codes differ most."""
    axis = _axis(grid, width)
    strongest = torch.linalg.svd(axis, full_matrices=False)[2][: (min(width, most) - 1) // 2]
    codes = F.pad(torch.block_diag(strongest, strongest), (0, width - 2 * axis.shape[1]))
    free = _randn(width)
    free -= codes.T @ (codes @ free)
    return torch.cat([free[None] / free.norm(), codes])


def _fetch(attention: SelfAttention, axes: Tensor, mark: Tensor) -> None:
    """Queries meet the keys of marked tokens at their own place; values and output copy the channels that say what."""
    width, where = len(mark), axes.shape[1]
    head_dim = width // attention.num_heads
    compare = F.pad(axes, (0, width - where, 0, head_dim - len(axes))).repeat(attention.num_heads, 1)
    compare *= (MATCH * head_dim**0.5 / width) ** 0.5
    copy = torch.linalg.qr(_randn(width, width - where))[0]

    query, key, value = attention.in_proj.weight.chunk(3)
    _add(query, compare)
    _add(key, compare)
    value.zero_()[:, where:].copy_(copy)
    attention.in_proj.bias[:width].copy_(compare @ mark)
    attention.out_proj.weight.zero_()[where:].copy_(copy.T)


def _initialize_decoder(decoder: Any, code: PatchCode) -> None:
    width = decoder.latent_token_positional_embedding.shape[1]
    where, what = width // 2, width - width // 2
    places = F.pad(place_codes(code.grid, where), (0, what))[code.places]
    _add(decoder.latent_token_positional_embedding[-len(places) :], places)
    directions, gains = code.directions(what)
    decoder.decoder_embed.weight.zero_()[where:, : code.count].copy_(directions * gains / code.scale)
    rms = ((where + what * CONTENT**2) / width) ** 0.5
    pixels = code.cosines.permute(2, 3, 1, 0).flatten(0, 2)  # (row, column, colour) x count, as the heads order them
    for name in ("ffn", "ffn_aux"):
        if hasattr(decoder, name):
            head = getattr(decoder, name)[0]
            head.weight.zero_()[:, where:, 0, 0].copy_(4 * rms * pixels @ (directions / gains).T)  # 4: sigmoid's slope
            head.bias.fill_(4 * (MEAN - 0.5))


def _axis(grid: int, width: int) -> Tensor:
    """(grid, width // 4 * 2): sines and cosines of a row or a column, with half periods from one patch to the grid."""
    half_periods = grid ** torch.linspace(0, 1, width // 4, dtype=torch.float32, device="cpu")
    angles = math.pi * _steps(grid)[:, None] / half_periods
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


def place_codes(grid: int, width: int) -> Tensor:
    """(grid * grid, width) codes of the places of a grid in raster order, row and column side by side; rms 1."""
    axis = _axis(grid, width)
    codes = torch.cat([axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)], dim=1)
    return F.pad(codes, (0, width - codes.shape[1]))


def places_of_tokens(grid: int, prefix: int) -> list[int]:
    """The patch that each token stands for: of prefix tokens the first patch and then the first row (with fewer of them
    its beginning, with more of them the first patch again), then all patches."""
    repeated = max(prefix - grid, 0)
    return [0] * repeated + list(range(prefix - repeated)) + list(range(grid**2))


def photograph_cosines(patch: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` strongest cosines of a patch of a photograph, orthonormal (count, 3, patch, patch), and (count,)
    their standard deviations for pixels in [0, 1]."""
    steps = _steps(patch)
    waves = torch.cos(math.pi * (steps + 0.5) * steps[:, None] / patch) * (2 / patch) ** 0.5
    waves[0] /= 2**0.5
    colours = F.normalize(_tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]))
    frequency = torch.hypot(steps[:, None], steps)[..., None]
    deviations = patch * torch.where(frequency == 0, _tensor(CONSTANTS), _tensor(PATTERNS) / frequency)
    strongest = deviations.flatten().argsort(descending=True, stable=True)[:count]
    row, column, colour = torch.unravel_index(strongest, deviations.shape)
    return torch.einsum("nc,ni,nj->ncij", colours[colour], waves[row], waves[column]), deviations.flatten()[strongest]


def _layers(side: nn.Module) -> list[TokenizerLayer]:
    return [module for module in side.modules() if isinstance(module, TokenizerLayer)]


def _add(parameter: Tensor, values: Tensor) -> None:
    parameter.add_(values.to(parameter.device))
