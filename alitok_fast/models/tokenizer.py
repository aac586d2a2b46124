"""The AliTok tokenizer (arXiv 2506.05289, section 3): images to tokens and back.

A token sequence is `num_prefix_tokens` tokens that stand for the first patch and the
first row of patches (`aux_target`), then `num_image_tokens` tokens in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alitok_fast.config import TokenizerConfig
from alitok_fast.models.checks import check_finite, check_range, check_tensor
from alitok_fast.models.hub import HubModel
from alitok_fast.models.initialization import initialize
from alitok_fast.models.layers import Conv2d, LayerNorm, Linear, PointwiseConv, TokenizerLayer, making, new_parameter
from alitok_fast.models.vector_quantizer import VectorQuantizer
from alitok_fast.ops.vq_lookup import VQLookup
from alitok_fast.storage.files import weights_fingerprint


class TokenizerOutput(NamedTuple):
    """What a training step needs.

    `reconstruction` (B, 3, H, W) in (0, 1); `aux` (B, 3, patch, num_prefix_tokens * patch) in (0, 1), None where there
    is no auxiliary head; `z` (B * N, code_dim) float32 features before quantizing; `vq` the lookup of those features.
    """

    reconstruction: Tensor
    aux: Tensor | None
    z: Tensor
    vq: VQLookup


class Encoder(nn.Module):
    """Transformer over [patches, latent tokens]; the latents come out.

    Bidirectional, or, with `config.causal_encoder`, causal among the latents: patches see all patches and no latents,
    and latent i sees all patches and the latents up to i. So token i does not depend on later ones.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.positional_embedding = new_parameter(config.num_image_tokens, width)
        self.latent_token_positional_embedding = new_parameter(config.num_tokens, width)
        self.patch_embed = Conv2d(3, width, config.patch_size, config.patch_size)
        self.ln_pre = LayerNorm(width)
        layers = range(config.encoder_layers)
        self.transformer = nn.ModuleList(TokenizerLayer(width, config.encoder_heads) for _ in layers)
        self.ln_post = LayerNorm(width)
        self.conv_out = PointwiseConv(width, config.code_dim)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """images (B, 3, H, W), latent_tokens (N, width) -> (B, N, code_dim)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).to(patches.dtype)
        x = self.ln_pre(torch.cat([patches, latents.expand(images.shape[0], -1, -1)], dim=1))
        prefix_len = patches.shape[1] if self.config.causal_encoder else x.shape[1]
        for layer in self.transformer:
            x = layer(x, prefix_len)
        return self.conv_out(self.ln_post(x[:, patches.shape[1] :]))


class Decoder(nn.Module):
    """Transformer over [start tokens, prefix tokens, image tokens], then pixel heads.

    Stage 1: one start token, causal attention, an auxiliary head on the prefix. Stage 2: buffer tokens, bidirectional.
    The configuration can say otherwise; what it leaves out (start tokens, the head) is in no file either.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, start = config.decoder_width, config.num_start_tokens
        self.class_embedding = new_parameter(start, width) if start else None
        self.latent_token_positional_embedding = new_parameter(start + config.num_tokens, width)
        self.decoder_embed = Linear(config.code_dim, width)
        self.ln_pre = LayerNorm(width)
        layers = range(config.decoder_layers)
        self.transformer = nn.ModuleList(TokenizerLayer(width, config.decoder_heads) for _ in layers)
        self.ln_post = LayerNorm(width)
        patch_values = 3 * config.patch_size**2
        self.ffn = nn.Sequential(PointwiseConv(width, patch_values))
        self.conv_out = PointwiseConv(3, 3)
        if config.has_auxiliary_head:
            self.ffn_aux = nn.Sequential(PointwiseConv(width, patch_values))
            self.conv_out_aux = PointwiseConv(3, 3)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """codes (B, N, code_dim) -> images (B, 3, H, W) in (0, 1), and the auxiliary strip where there is its head."""
        config = self.config
        x = self._trunk(codes)
        prefix, image = x.split([config.num_prefix_tokens, config.num_image_tokens], dim=1)
        images = self.pixels(self.ffn(image), self.conv_out, config.grid)
        if not config.has_auxiliary_head:
            return images, None
        return images, self.pixels(self.ffn_aux(prefix), self.conv_out_aux, 1)

    def rows(self, codes: Tensor) -> Tensor:
        """The whole image rows that the first n tokens hold (a causal decoder): (B, 3, rows * patch, W)."""
        config = self.config
        rows = max(codes.shape[1] - config.num_prefix_tokens, 0) // config.grid
        image = self._trunk(codes)[:, config.num_prefix_tokens :][:, : rows * config.grid]
        return self.pixels(self.ffn(image), self.conv_out, rows)

    def _trunk(self, codes: Tensor) -> Tensor:
        """(B, n, code_dim) -> (B, n, width), the start tokens dropped."""
        x = self.decoder_embed(codes)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(codes.shape[0], -1, -1), x], dim=1)
        x = self.ln_pre(x + self.latent_token_positional_embedding[: x.shape[1]].to(x.dtype))
        prefix_len = 0 if self.config.decoder_is_causal else x.shape[1]
        for layer in self.transformer:
            x = layer(x, prefix_len)
        return self.ln_post(x)[:, self.config.num_start_tokens :]

    def pixels(self, values: Tensor, conv: PointwiseConv, rows: int) -> Tensor:
        """(B, rows * columns, patch * patch * 3), channels (p1, p2, c) -> (B, 3, rows * patch, columns * patch)."""
        p, batch = self.config.patch_size, values.shape[0]
        columns = values.shape[1] // rows if rows else self.config.grid
        values = conv(values.reshape(batch, rows, columns, p, p, 3))  # mixes colours: the order of pixels is free
        return torch.sigmoid(values).permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, rows * p, columns * p)


class Tokenizer(HubModel):
    """Encoder, quantizer and decoder; `config.stage` says which decoder. Made in float32."""

    kind = "tokenizer"

    def __init__(self, config: TokenizerConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        with making(device):
            self.latent_tokens = new_parameter(config.num_tokens, config.encoder_width)
            self.encoder = Encoder(config)
            self.quantize = VectorQuantizer(config)
            self.decoder = Decoder(config)
        self._initialize()

    def _initialize(self) -> None:
        if not self.latent_tokens.is_meta:
            initialize(self)

    @property
    def device(self) -> torch.device:
        return self.latent_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_tokens.dtype

    @property
    def codebook_size(self) -> int:
        """The number of different tokens."""
        return self.config.codebook_size

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> z (B, N, code_dim), before quantizing."""
        return self.encoder(images.to(self.dtype), self.latent_tokens)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """One training pass over images (B, 3, H, W) in [0, 1]; see `TokenizerOutput`."""
        z = self.features(images)
        flat = z.flatten(0, 1).float()
        vq = self.quantize(flat)
        reconstruction, aux = self.decoder(vq.quantized.view(z.shape).to(self.dtype))
        return TokenizerOutput(reconstruction, aux, flat, vq)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), finite floats in [0, 1] -> tokens (B, N) int64 in [0, codebook_size).

        Raises TypeError or ValueError for another dtype, shape, device or range, ValueError where the features or the
        codebook are not finite: weights that are not numbers, or a precision that overflows.
        """
        size = self.config.image_size
        check_tensor("images", images, None, ("B", 3, size, size), self.device)
        check_range("images", images, 0, 1, closed=True)
        z = self.features(images)
        check_finite("features", z)
        check_finite("codebook", self.quantize.codebook)
        return self.quantize(z.flatten(0, 1)).indices.view(z.shape[:2])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64 -> images (B, 3, H, W) in [0, 1], in the model's dtype.

        Raises TypeError or ValueError for another dtype, shape, device or range, or for pixels that are not finite.
        """
        check_tensor("tokens", tokens, torch.int64, ("B", self.config.num_tokens), self.device)
        check_range("tokens", tokens, 0, self.config.codebook_size)
        return check_finite("pixels", self.decoder(self.quantize.embedding(tokens))[0])

    @torch.no_grad()
    def decode_rows(self, tokens: Tensor) -> Tensor:
        """The image rows so far from the first n tokens, (B, n <= N) -> (B, 3, rows * patch, W); causal decoder."""
        check_causal("decode_rows", self.config)
        check_tensor("tokens", tokens, torch.int64, ("B", f"n <= {self.config.num_tokens}"), self.device)
        if tokens.shape[1] > self.config.num_tokens:
            raise ValueError(f"tokens: expected at most {self.config.num_tokens} per row, got {tokens.shape[1]}")
        check_range("tokens", tokens, 0, self.config.codebook_size)
        return check_finite("pixels", self.decoder.rows(self.quantize.embedding(tokens)))


def encoder_fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of the weights that determine an image's tokens: encoder, latent tokens and codebook, in float32."""
    decisive = ("latent_tokens", "encoder.", "quantize.embedding.")
    return weights_fingerprint({name: value for name, value in state.items() if name.startswith(decisive)})


def check_causal(name: str, config: TokenizerConfig) -> None:
    """ValueError about the argument `name` unless the decoder can paint rows before it has all tokens."""
    if not config.decoder_is_causal:
        raise ValueError(f"{name}: expected a causal decoder, as of stage 1, got a bidirectional one")


def stage2_from_stage1(
    stage1: Tokenizer, num_buffer_tokens: int | None = None, causal_decoder: bool | None = None
) -> Tokenizer:
    """A stage-2 tokenizer with the encoder, latent tokens and codebook of `stage1`, frozen, and a fresh decoder.

    `num_buffer_tokens` None is what the configuration of `stage1` says. The new decoder is bidirectional, whatever
    that of `stage1` is, unless `causal_decoder`.
    """
    if stage1.config.stage != 1:
        raise ValueError(f"stage1: expected a stage-1 tokenizer, got stage {stage1.config.stage}")
    buffers = stage1.config.num_buffer_tokens if num_buffer_tokens is None else num_buffer_tokens
    config = replace(stage1.config, stage=2, num_buffer_tokens=buffers, causal_decoder=causal_decoder)
    model = Tokenizer(config).to(stage1.device, stage1.dtype)
    model.latent_tokens.data.copy_(stage1.latent_tokens)
    model.encoder.load_state_dict(stage1.encoder.state_dict())
    model.quantize.embedding.load_state_dict(stage1.quantize.embedding.state_dict())
    for frozen in (model.encoder, model.quantize):
        frozen.requires_grad_(False)
    model.latent_tokens.requires_grad_(False)
    return model


def aux_target(images: Tensor, config: TokenizerConfig) -> Tensor:
    """What the prefix stands for: the first patch, then the first row of patches (section 3.2).

    With as many prefix tokens as a row has patches it is the row alone, with fewer its beginning. Tokens beyond
    1 + grid all stand for the first patch.

    images (B, 3, H, W) -> (B, 3, patch, num_prefix_tokens * patch).
    """
    p, prefix = config.patch_size, config.num_prefix_tokens
    repeated = max(prefix - config.grid, 0)
    row = images[:, :, :p, : (prefix - repeated) * p]
    return torch.cat([*[images[:, :, :p, :p]] * repeated, row], dim=3)
