"""The generator: a decoder-only transformer over [condition, t_0 ... t_N-1] (arXiv 2506.05289, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast.config import GeneratorConfig
from alitok_fast.models.checks import check_range, check_tensor
from alitok_fast.models.hub import HubModel
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.models.layers import NORM_EPS, Embedding, GeneratorBlock, Linear, RMSNorm, making, weights_of
from alitok_fast.models.rope import rope_table
from alitok_fast.ops.decode import SampleState, sample_next
from alitok_fast.ops.norm_head import norm_head

PROMPT_INPUTS = 256  # of a pass that reads a prompt, as many as in csrc/decode.h


def condition_ids(
    config: GeneratorConfig, labels: Tensor | None, batch_size: int, device: torch.device, check: bool = True
) -> Tensor:
    """Embedding rows (B,) of the labels, or of "no condition" where labels is None; `check` looks at the range."""
    if labels is None:
        return torch.full((batch_size,), config.no_condition, dtype=torch.int64, device=device)
    check_tensor("labels", labels, torch.int64, (batch_size,), device)
    if check:
        check_range("labels", labels, 0, config.num_classes)
    return labels + config.first_class


def sample_passes(model: Any, state: SampleState, cache: KVCache, passes: int, window: int = 1) -> None:
    """`Generator.sample_passes` for whatever has `step`, one pass after the other."""
    ids = state.ids[:, :window]
    for _ in range(passes):
        sample_next(state, model.step(ids, cache, state.positions, state.slots), window)


def read_prompt(model: Any, state: SampleState, cache: KVCache, length: int) -> int:
    """`Generator.read_prompt` for whatever has `step`."""
    rows, batch = len(state.positions), len(state.tokens)
    inputs = torch.cat([state.ids[:, :1], state.tokens[:, : length - 1].repeat(rows // max(batch, 1), 1)], 1)
    if length < state.tokens.shape[1]:  # else there is nothing to draw from what would be read
        width = max(1, PROMPT_INPUTS // max(rows, 1))
        for begin in range(0, length, width):
            model.step(inputs[:, begin : begin + width].contiguous(), cache, state.positions + begin, state.slots)
            state.passes.add_(1)
        follows = _usable(state.tokens[:, length - 1 : length - 1 + state.ids.shape[1]], model.config.codebook_size)
        state.ids[:, : follows.shape[1]] = follows.repeat(rows // max(batch, 1), 1)
        state.positions.add_(length)
    else:
        state.positions.fill_(-1)
    return length


def _usable(tokens: Tensor, codes: int) -> Tensor:
    """(B, W), the first of each row a code: what is none is the one before it again, as in `sample_next`."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.gather(1, torch.where((tokens >= 0) & (tokens < codes), place, 0).cummax(1).values)


def _after_loading(generator: Generator, _: object) -> None:
    generator._settle()


class Generator(HubModel):
    """Class label and tokens in, next-token logits out. Made in float32.

    The embedding holds the codes, one unused slot, the classes and "no condition".
    """

    kind = "generator"

    def __init__(self, config: GeneratorConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        with making(device):
            self.embeddings = Embedding(config.vocabulary, config.width)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                GeneratorBlock(config.width, config.num_heads, config.hidden, config.dropout)
                for _ in range(config.num_layers)
            )
            self.norm = RMSNorm(config.width)
            self.output = Linear(config.width, config.codebook_size)
        # The table is no weight and in no file. It has values on "meta" too, and `_settle` keeps it beside the weights.
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)
        self._settle()
        self._initialize()

    def _initialize(self) -> None:
        if self.output.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)

    def _exact(self) -> list[nn.Parameter]:
        """Parameters that stay float32: what guidance scales of 16 would amplify the rounding of.

        Reduced precision is for the blocks, where nearly all weights are. Embeddings, the last norm and the head (and
        with them the residual stream and the logits) stay float32, and so do the norms of queries and keys, which the
        attention kernels read as float32.
        """
        outside = [self.embeddings, self.norm, self.output]
        norms = [norm for block in self.blocks for norm in (block.attn.q_norm, block.attn.k_norm)]
        return [parameter for module in (*outside, *norms) for parameter in module.parameters(recurse=False)]

    def _apply(self, fn, recurse: bool = True):
        """Moves everything, but leaves `_exact` parameters and their gradients, and the rotary table, in float32."""
        exact = self._exact()
        exact += [parameter.grad for parameter in exact if parameter.grad is not None]

        def convert(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16) and any(tensor is kept for kept in exact):
                return tensor.to(result.device, torch.float32)
            return result if tensor is not self.rope else result.to(torch.float32)

        super()._apply(convert, recurse)
        table = rope_table(self.config)
        if self.rope.is_meta:
            self.rope = table
        else:  # `to_empty` leaves memory without values, `share_memory` memory that must stay
            with torch.inference_mode(self.rope.is_inference()):
                self.rope.copy_(table)
        self._settle()
        return self

    @torch.no_grad()
    def _settle(self) -> None:
        """Puts right what weights from elsewhere (loading with assign=True) leave wrong: dtypes, the table's device."""
        for parameter in self._exact():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        weight = self.output.weight
        if not weight.is_meta and self.rope.device != weight.device:
            self.rope = self.rope.to(weight.device)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' weights."""
        return self.blocks[0].attn.qkv.weight.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """As `dtype`."""
        return self.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the key/value cache, unless another is asked for."""
        return self.dtype

    def forward(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """tokens (B, n <= N) int64, labels (B,) int64 in [0, classes) or None: unconditional -> (B, n + 1, K) logits.

        Position i's logits predict token i. In training mode each label is dropped to "no condition" with probability
        `config.class_dropout`. Raises TypeError or ValueError for another dtype, shape, device or range
        (ranges are checked in evaluation mode only).
        """
        self._check_tokens(tokens)
        condition = self.condition_ids(labels, tokens.shape[0])
        if self.training and self.config.class_dropout:
            dropped = torch.rand(tokens.shape[0], device=self.device) < self.config.class_dropout
            condition = torch.where(dropped, self.config.no_condition, condition)
        x = self.dropout(self.embeddings(torch.cat([condition.unsqueeze(1), tokens], dim=1)))
        rope, delta = self.rope[: x.shape[1]], None
        for block in self.blocks:
            x, delta = block(x, delta, rope)
        return self.output(self.norm(x + self.dropout(delta)))

    def new_cache(self, slots: int, dtype: torch.dtype | None = None, columns: int = 1) -> KVCache:
        """An empty cache for `slots` sequences; `dtype` None is the model's, torch.float8_e4m3fn half of bfloat16."""
        return KVCache(self.config, slots, self.device, dtype or self.cache_dtype, columns)

    @torch.no_grad()
    def step(self, ids: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Append W ids to each row's sequence, ids (R, W) rows of the embedding; logits (R, W, K) of what follows each.

        A sequence begins with its condition (`condition_ids`), tokens follow. `positions` and `slots` are those of
        `alitok_fast.ops.decode`, on the device. Nothing is read back from it, so that a CUDA graph can capture a step;
        of rows that rest, and past the cache's end, the logits are NaN.
        """
        check_tensor("ids", ids, torch.int64, ("R", "W"), self.device)
        first, *others = self.blocks
        x, packed = first.embed(ids.flatten(), self.embeddings.weight)
        x, delta = first.step(x, packed, self.rope, cache, 0, positions, slots)
        for layer, block in enumerate(others, 1):
            x, packed = block.project(x, delta)
            x, delta = block.step(x, packed, self.rope, cache, layer, positions, slots)
        weight, _, bias = weights_of(self.output)
        return norm_head(x, delta, self.norm.weight, NORM_EPS, weight, bias).view(*ids.shape, -1)

    def expect(self, inputs: int) -> None:
        """Many steps of so many inputs will follow, for which there is nothing to make ready."""

    def sample_passes(self, state: SampleState, cache: KVCache, passes: int, window: int = 1) -> None:
        """`passes` times: feed the first `window` ids of each row, draw, and feed next what follows (`sample_next`)."""
        sample_passes(self, state, cache, passes, window)

    def read_prompt(self, state: SampleState, cache: KVCache, length: int) -> int:
        """Feed the first `length` >= 1 tokens of sequences that are all at their beginning, in a few passes of up to
        256 inputs; returns how many tokens are behind them then."""
        return read_prompt(self, state, cache, length)

    def tensors(self) -> list[Tensor]:
        """What a step reads beside the cache."""
        return [tensor.data for tensor in (*self.parameters(), *self.buffers())]

    def condition_ids(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Embedding rows (B,) of the labels, or of "no condition" where labels is None."""
        # A training step must not wait for the device to check a range.
        return condition_ids(self.config, labels, batch_size, self.device, check=not self.training)

    def _check_tokens(self, tokens: Tensor) -> None:
        check_tensor("tokens", tokens, torch.int64, ("B", f"n <= {self.config.num_tokens}"), self.device)
        if tokens.shape[1] > self.config.num_tokens:
            raise ValueError(f"tokens: expected at most {self.config.num_tokens} per row, got {tokens.shape[1]}")
        if not self.training:
            check_range("tokens", tokens, 0, self.config.codebook_size)
