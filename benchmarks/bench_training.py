"""A step of training, forward, backward, clipping and AdamW in bfloat16 autocast: the generators, both stages of the
tokenizer; beside the reference's own model and ours in plain PyTorch, compiled.

They train the same weights, with gradients and moments that are there once, so that XL fits into memory with its peers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alitok_fast.config import TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.models import Generator, Tokenizer
from alitok_fast.models.tokenizer import aux_target
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig, TrainConfig
from alitok_fast.training.losses import auxiliary_loss, generator_loss, reconstruction_loss
from alitok_fast.training.optim import adamw
from floor import decode_weights, step_weights
from peers.reference import load_reference
from peers.sdpa import plain
from timing import Contender, Missing

BUDGET = 20.0  # seconds of one system
COMPILED = "SDPA, torch.compile, bf16 autocast"
REFERENCE = "reference, bf16 autocast"
BATCHES = {"cpu": {"b": 8, "l": 4, "xl": 2, "tokenizer": 2}, "cuda": {"b": 64, "l": 64, "xl": 32, "tokenizer": 32}}


class Step:
    """One optimizer step of a model on one batch, over and over."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor], config: TrainConfig) -> None:
        self.model, self.loss, self.config = model.train(), loss, config
        self.device = next(model.parameters()).device
        self.optimizer = adamw(model, config)

    def of(self, other: nn.Module) -> Step:
        """The same with another module for the same weights, by name; it keeps those that are its own."""
        step = copy.copy(self)
        step.model = other.train()
        weights = dict(self.model.named_parameters())
        for path, _ in list(other.named_parameters()):
            owner, _, name = path.rpartition(".")
            if path in weights:
                setattr(other.get_submodule(owner), name, weights[path])
        return step

    def __call__(self) -> None:
        self.backward()
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(self.model)
        loss.backward()
        return loss.detach()

    def kept(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, weights not counted."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(sizes.values())


def flops(weights: int, layers: int, pairs: float, positions: int, width: int, batch: int) -> float:
    """Six for each weight and position; of attention's two products forward and five backward, two for each pair."""
    return batch * (6.0 * weights * positions + layers * 7 * 2.0 * pairs * width)


def generator_flops(config: GeneratorConfig, batch: int) -> float:
    length = 1 + config.num_tokens
    pairs = length * (length + 1) / 2
    return flops(step_weights(config), config.num_layers, pairs, length, config.width, batch)


def tokenizer_flops(config: TokenizerConfig, batch: int) -> float:
    """Of stage 1, encoder and decoder; of stage 2 the encoder runs forward only."""
    length = config.num_tokens + config.num_start_tokens
    pairs = length * (length + 1) / 2 if config.stage == 1 else float(length**2)
    decoder = flops(decode_weights(config), config.decoder_layers, pairs, length, config.decoder_width, batch)
    return decoder + encoder_flops(config, batch) * (3 if config.stage == 1 else 1)


def encoder_flops(config: TokenizerConfig, batch: int) -> float:
    """Of a forward pass."""
    width, length = config.encoder_width, config.num_tokens + config.num_image_tokens
    weights = config.encoder_layers * 12 * width * width
    return batch * (2.0 * weights * length + config.encoder_layers * 4.0 * length * length * width)


def agree(own: Step, other: Step) -> None:
    """Losses in evaluation mode, and the gradients of every weight that both have, agree to bfloat16's rounding."""
    losses, gradients = [], []
    for step in (own, other):
        step.model.eval()
        losses.append(step.backward())
        gradients.append([weight.grad for weight in own.model.parameters()])
        step.model.train()
        step.optimizer.zero_grad(set_to_none=True)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=1e-3)
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    error = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    assert pairs and error < 0.1 * sum(float(a.square().sum()) for a, _ in pairs) ** 0.5


def timed(measure, mode, ceilings, own: Step, others: dict, work: float, batch: int, size: str) -> None:
    contenders: dict = {"alitok_fast": Contender(own)}
    for name, other in others.items():
        contenders[name] = other if isinstance(other, Missing) else Contender(other)
        if isinstance(other, Step):
            agree(own, other)
    peak = ceilings.bf16_flops if mode.timed else None
    facts = {"kind": "operator", "work": work, "unit": "bf16_flops", "ceiling": peak, "batch": batch, "size": size}
    info = measure(contenders, budget=mode.pick(check=0.0, quick=1.0, full=BUDGET), kept_bytes=own.kept(), **facts)
    if info is not None:
        median = info["contenders"]["alitok_fast"]["seconds"]["median"]
        print(f"{size}: {batch / median:.3g} samples per second, {info['kept_bytes'] / 2**30:.2f} GiB kept")


def plain_step(own: Step, mode) -> Step | Missing:
    if mode.timed and mode.quick:
        return Missing("compiling takes longer than a quick run may")
    return own.of(plain(own.model, compiled=mode.timed))


def reference_models(checkout, mode, generator, tokenizer: Tokenizer, size: str = "b") -> tuple | Missing:
    """The reference's generator and tokenizer with our weights, or why they are not there."""
    if checkout is None:
        return Missing("no checkout of the reference: --reference-repo PATH")
    if not mode.timed or mode.quick:
        return Missing("its models have full size only: not with --quick")
    return load_reference(checkout, size, generator(size), tokenizer)


@pytest.mark.quick("b")
@pytest.mark.parametrize("size", ["b", "l", "xl"])
def bench_generator_step(size, generator, tokenizer, measure, mode, device, ceilings, reference_repo):
    gen: Generator = generator(size)
    batch = mode.pick(check=2, quick=2, full=BATCHES[device.type][size])
    tokens = torch.randint(gen.config.codebook_size, (batch, gen.config.num_tokens), device=device)
    labels = torch.arange(batch, device=device)
    config = GeneratorTrainConfig()

    def loss(model: nn.Module) -> Tensor:
        classes = labels if isinstance(model, Generator) else gen.condition_ids(labels, batch)  # or the reference's
        return generator_loss(model(tokens, classes), tokens)

    own = Step(gen.requires_grad_(True), loss, config)
    others: dict = {COMPILED: plain_step(own, mode)}
    others[REFERENCE] = reference = reference_models(reference_repo, mode, generator, tokenizer, size)
    if not isinstance(reference, Missing):
        others[REFERENCE] = own.of(reference[0])
    try:
        timed(measure, mode, ceilings, own, others, generator_flops(gen.config, batch), batch, size)
    finally:
        gen.eval().requires_grad_(False)  # it is every benchmark's


@pytest.mark.quick("1")
@pytest.mark.parametrize("stage", [1, 2])
def bench_tokenizer_step(stage, generator, measure, mode, device, ceilings, reference_repo):
    """Mean squared error, and in stage 1 the auxiliary and the quantizer's loss: what the recipe always has.

    The reference publishes the network of stage 2 alone.
    """
    full = TOKENIZERS["256"]
    layers = mode.pick(check=1, quick=2, full=None)
    small = {} if layers is None else {"encoder_layers": layers, "decoder_layers": layers}
    size = mode.pick(check=64, quick=256, full=256)
    model_config = TokenizerConfig(**{**full.to_dict(), **small, "stage": stage, "image_size": size})
    model = Tokenizer(model_config, device)
    batch = mode.pick(check=1, quick=1, full=BATCHES[device.type]["tokenizer"])
    images = torch.rand(batch, 3, size, size, device=device)

    def loss(model: nn.Module) -> Tensor:
        output = model(images)
        if not isinstance(model, Tokenizer):  # the reference's: reconstruction, losses, tokens
            return reconstruction_loss(images, output[0])
        total = reconstruction_loss(images, output.reconstruction)
        if output.aux is not None:
            total = total + auxiliary_loss(aux_target(images, model_config), output.aux, model_config, 10.0)
            total = total + output.vq.loss
        return total

    if stage == 2:
        for frozen in (model.encoder, model.quantize):
            frozen.requires_grad_(False)
        model.latent_tokens.requires_grad_(False)
    own = Step(model, loss, TokenizerTrainConfig())
    others: dict = {COMPILED: plain_step(own, mode)}
    if stage == 2:
        others[REFERENCE] = reference = reference_models(reference_repo, mode, generator, model)
        if not isinstance(reference, Missing):
            others[REFERENCE] = own.of(reference[1])
    work = tokenizer_flops(model_config, batch)
    timed(measure, mode, ceilings, own, others, work, batch, f"tokenizer, stage {stage}")
