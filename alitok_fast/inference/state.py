"""The tensors of a batch that is sampled, and how its sequences begin."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.step_model import StepModel
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState

MOST_COLUMNS = 16  # of a window


@torch.inference_mode(False)  # else they could be written in such a mode only
def new_state(model: StepModel, images: int, guided: bool, slots: Tensor | None = None) -> SampleState:
    """The state of so many images, all at their beginning; `slots` as in `SampleState`."""
    steps, device, rows = model.config.num_tokens, model.device, images * (2 if guided else 1)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SampleState(
        ids=zeros(rows, MOST_COLUMNS),
        positions=zeros(rows),
        tokens=zeros(images, steps),
        prompt_lengths=zeros(images),
        schedule=zeros(images, steps, dtype=torch.float32) if guided else None,
        temperature=zeros(images, dtype=torch.float32),
        top_k=zeros(images),
        top_p=zeros(images, dtype=torch.float64).fill_(1),
        seeds=zeros(images),
        image_ids=zeros(images),
        passes=zeros(images),
        slots=slots,
    )


def begin(
    model: StepModel,
    state: SampleState,
    cache: KVCache,
    labels: Tensor,
    schedule: Tensor | None,
    params: SamplingParams,
    image_ids: Tensor,
    prompt_tokens: Tensor | None = None,
    guesses: Tensor | None = None,
) -> int:
    """Write the beginnings of these images into `state`; returns how many tokens of their prompt have been read.

    `schedule` is (N,), the guidance scale of each step; `guesses` (B, N) are tokens to try where no pass has looked
    yet, -1 for none.
    """
    images, condition = len(state.tokens), model.condition_ids(labels, len(state.tokens))
    if state.schedule is not None and schedule is not None:
        condition = torch.cat([condition, model.condition_ids(None, images)])
        state.schedule.copy_(schedule.expand_as(state.schedule))
    state.ids.copy_(condition[:, None].expand_as(state.ids))
    state.positions.zero_()
    state.passes.zero_()
    state.seeds.fill_(params.seed)
    state.image_ids.copy_(image_ids)
    state.temperature.fill_(params.temperature)
    state.top_k.fill_(params.top_k or 0)
    state.top_p.fill_(1.0 if params.top_p is None else params.top_p)
    state.prompt_lengths.fill_(0 if prompt_tokens is None else prompt_tokens.shape[1])
    state.tokens.fill_(-1)
    if guesses is not None:
        state.tokens.copy_(guesses)
    if prompt_tokens is not None:
        state.tokens[:, : prompt_tokens.shape[1]] = prompt_tokens
    first = state.tokens[:, : MOST_COLUMNS - 1].repeat(len(condition) // images, 1)
    state.ids[:, 1 : 1 + first.shape[1]] = first.clamp(min=0)
    prompt = 0 if prompt_tokens is None else prompt_tokens.shape[1]
    return model.read_prompt(state, cache, prompt) if prompt else 0
