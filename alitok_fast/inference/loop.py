"""The cached loop that samples one batch of token sequences."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import Turn, capture
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.state import MOST_COLUMNS, begin, new_state
from alitok_fast.inference.step_model import StepModel
from alitok_fast.inference.window import WindowChoice
from alitok_fast.models.kv_cache import KVCache

CALL_SECONDS = 0.05  # Ctrl-C waits for the end of a native call
PASSES_PER_CALL = (16, 256)


@dataclass(frozen=True)
class LastRun:
    """What the passes of a run were like.

    Attributes:
        passes: of an image, the mean of the batch; those that read a prompt are among them.
        tokens_per_pass: tokens that a pass settled for an image, on average.
        windows: (window, passes of the batch), in the order in which they ran.
    """

    passes: float
    tokens_per_pass: float
    windows: tuple[tuple[int, int], ...]


class SamplingLoop:
    """One batch while it is sampled. Every tensor that a pass reads or writes stays where it is.

    On a CUDA device the first run with a window captures its pass as a CUDA graph and replays it, so that there is no
    launch overhead. A loop can be run again with other labels, settings and schedules.

    Runs from several threads take turns, whatever streams they use. `turn` is given by an owner of several loops: it
    makes them inside a turn, and calls `run` inside one, with `in_turn`.
    """

    def __init__(
        self,
        model: StepModel,
        batch_size: int,
        guided: bool,
        kv_dtype: torch.dtype | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.model, self.batch_size, self.guided = model, batch_size, guided
        rows, device = batch_size * (2 if guided else 1), model.device
        try:
            self.model.expect(rows)
            self.cache = self.model.new_cache(rows, kv_dtype, MOST_COLUMNS)
        except RuntimeError as error:
            size = rows * KVCache.bytes_per_slot(model.config, kv_dtype or self.model.cache_dtype)
            raise MemoryError(
                f"labels: expected a batch whose cache fits in memory, got {batch_size} images, "
                f"{size / 2**30:.1f} GiB; alitok_fast.plan(gen) says how many fit"
            ) from error

        self.state = new_state(model, batch_size, guided)
        self.last_run: LastRun | None = None
        self._passes_per_call = PASSES_PER_CALL[0]
        self._prompt = 0, 0  # its tokens, and how many of them have been read
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._read_by_graphs: list[Tensor] = []
        self.turn = Turn(device) if turn is None else turn
        self.turn.outlives(self)

    def run(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        params: SamplingParams,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
        guesses: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        choice: WindowChoice | None = None,
        in_turn: bool = False,
    ) -> Tensor:
        """tokens (B, N); arguments as in `sampler.sample`, checked there. Rows without a distribution hold -1.

        `schedule` is (N,), the guidance scale of each step. `guesses` (B, N): tokens to try where no pass has looked
        yet, -1 for none. `choice` chooses the windows and learns from what they cost; None is single tokens. `in_turn`:
        the caller has the turn already.
        """
        choice = choice or WindowChoice((1,))
        with contextlib.nullcontext() if in_turn else self.turn:
            given = labels, schedule, params, image_ids, prompt_tokens, guesses
            if self.model.device.type == "cuda":
                for window in choice.windows:
                    if window not in self._graphs:
                        self.model.expect(len(self.state.ids) * window)
                        self.start(*given)
                        self._graphs[window] = capture(self.model.device, partial(self.do_pass, window))
                self._read_by_graphs = self.model.tensors()
            self.start(*given)
            tokens, told = self.state.tokens, 0
            for known in self._passes(choice, one_by_one=on_step is not None):
                if on_step is not None:
                    for step in range(told, known):
                        on_step(step, tokens[:, : step + 1].clone())
                told = known
            return tokens.clone()

    def start(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        params: SamplingParams,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
        guesses: Tensor | None = None,
    ) -> None:
        """Write the beginnings of these images where the next pass reads them."""
        prompt = 0 if prompt_tokens is None else prompt_tokens.shape[1]
        given = labels, schedule, params, image_ids, prompt_tokens, guesses
        self._prompt = prompt, begin(self.model, self.state, self.cache, *given)

    def _passes(self, choice: WindowChoice, one_by_one: bool) -> Iterator[int]:
        """Do passes until all images are done; yields now and then how many tokens of each image are known."""
        state, length, on_cpu = self.state, self.state.tokens.shape[1], self.model.device.type == "cpu"
        reads_back = on_cpu or choice.windows[-1] > 1  # else a pass settles a token, and nothing waits for the device
        (prompt, known), used = self._prompt, list[tuple[int, int]]()
        before, read = [known] * self.batch_size, max(state.passes.tolist()) if reads_back else 0
        if known:
            yield known
        while known < length:
            window, passes = choice.next()
            if one_by_one:
                passes = 1
            elif on_cpu:
                passes = min(passes, self._passes_per_call, length - known)  # a native call stops when all are done
            else:
                passes = min(passes, -(-(length - known) // window))  # a replay does not; so many are not too many
            started = time.perf_counter()
            self.advance(passes, window)
            if not reads_back:
                known += passes
            else:
                progress, seconds = self._progress(), time.perf_counter() - started
                passes = max(state.passes.tolist()) - read - sum(some for _, some in used)
                if known >= prompt:
                    settled = [now - at for now, at in zip(progress, before, strict=True) if at < length]
                    choice.after(window, passes, seconds, sum(settled) / len(settled))
                    fewest, most = PASSES_PER_CALL
                    self._passes_per_call = min(max(fewest, int(CALL_SECONDS * passes / seconds)), most)
                known, before = min(progress), progress
            if passes:  # a prompt of the whole length needs none
                used.append((window, passes))
            yield known
        self._remember(used)

    def _progress(self) -> list[int]:
        """How many tokens of each image are known, to both of its rows."""
        length = self.state.tokens.shape[1]
        rows = [length if at < 0 else at for at in self.state.positions.tolist()]
        return list(map(min, rows[: self.batch_size], rows[-self.batch_size :]))

    def _remember(self, used: list[tuple[int, int]]) -> None:
        windows: list[tuple[int, int]] = []
        for window, passes in used:
            if windows and windows[-1][0] == window:
                passes += windows.pop()[1]
            windows.append((window, passes))
        mean, length = float(self.state.passes.float().mean()), self.state.tokens.shape[1]
        self.last_run = LastRun(mean, length / mean if mean else 0.0, tuple(windows))

    def advance(self, passes: int, window: int = 1) -> None:
        """Up to `passes` passes: replays of the graph, where one was captured."""
        if window not in self._graphs:
            self.model.expect(len(self.state.ids) * window)
            return self.model.sample_passes(self.state, self.cache, passes, window)
        for _ in range(passes):
            self._graphs[window].replay()

    def do_pass(self, window: int = 1) -> None:
        """Feed each row's ids, draw, and feed next what follows; without the graph."""
        self.model.sample_passes(self.state, self.cache, 1, window)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, which is nearly all that a loop holds."""
        return self.cache.keys.nbytes + self.cache.values.nbytes
