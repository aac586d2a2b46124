"""What a pass of the generator is made of, whatever the machine: matrices, bytes, operations, phases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alitok_fast.config import GeneratorConfig

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
EIGHT_BITS = ("int8", "float8_e4m3fn")
GROUP = 64  # inputs of an output that share a bfloat16 scale, where weights have 8 bits


@dataclass(frozen=True)
class Work:
    """One pass: every image has two rows, because of guidance, and `window` inputs in each.

    Formats have the names of torch's dtypes. `cache` None is float32 for float32 weights, else bfloat16. `activations`
    is "int8" or None. `position` is how many tokens are before the first input; None is the mean over an image.
    """

    config: GeneratorConfig
    batch: int
    weights: str = "bfloat16"
    cache: str | None = None
    activations: str | None = None
    window: int = 1
    position: float | None = None

    def __post_init__(self) -> None:
        tokens = self.config.num_tokens
        _require(isinstance(self.batch, int) and self.batch >= 1, "batch", "an integer >= 1", self.batch)
        whole = isinstance(self.window, int) and 1 <= self.window <= tokens
        _require(whole, "window", f"an integer in 1..{tokens}", self.window)
        _require(self.weights in BYTES, "weights", f"one of {', '.join(BYTES)}", self.weights)
        _require(self.cache is None or self.cache in BYTES, "cache", f"None or one of {', '.join(BYTES)}", self.cache)
        _require(self.activations in (None, "int8"), "activations", "None or int8", self.activations)
        most = tokens - self.window
        within = self.position is None or 0 <= self.position <= most
        _require(within, "position", f"None or a number in 0..{most}", self.position)

    @property
    def rows(self) -> int:
        return 2 * self.batch

    @property
    def inputs(self) -> int:
        """Rows of the matrix products."""
        return self.rows * self.window

    @property
    def before(self) -> float:
        """Tokens before the first input."""
        return (self.config.num_tokens - self.window) / 2 if self.position is None else self.position

    @property
    def seen(self) -> float:
        """Keys that an input attends to, the mean over a window."""
        return self.before + (self.window + 1) / 2

    @property
    def cache_format(self) -> str:
        return self.cache or ("float32" if self.weights == "float32" else "bfloat16")

    @property
    def head_weights(self) -> int:
        return self.config.width * self.config.codebook_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the products of a layer; `gate` is the two that share their inputs."""
        width, hidden = self.config.width, self.config.hidden
        return {"qkv": (3 * width, width), "proj": (width, width), "gate": (2 * hidden, width), "down": (width, hidden)}

    def attention_operations(self) -> float:
        """Of a layer: scores and sums of values."""
        return 4.0 * self.inputs * self.seen * self.config.width


def weight_bytes(outputs: int, inputs: int, weights: str) -> float:
    """Of a matrix, with the scales of 8-bit weights."""
    scales = 2 * outputs * -(-inputs // GROUP) if weights in EIGHT_BITS else 0
    return float(outputs * inputs * BYTES[weights] + scales)


@dataclass(frozen=True)
class Phase:
    """Kernels that do the same, of all layers together, and their seconds by term."""

    name: str
    kernels: int
    read: float
    """Bytes read and written."""
    operations: float
    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Step:
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def kernels(self) -> int:
        return sum(phase.kernels for phase in self.phases)

    def terms(self) -> dict[str, float]:
        """Seconds by term, of all phases together."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.terms)
        return {name: sum(phase.terms.get(name, 0.0) for phase in self.phases) for name in names}

    def table(self) -> str:
        """Phases and terms, in microseconds, for a screen or a log."""
        names = list(self.terms())
        rows = [("phase", "kernels", "MB", "GFLOP", *names, "us")]
        rows += [_row(phase.name, phase.kernels, phase.read, phase.operations, phase.terms, names, phase.seconds)
                 for phase in self.phases]  # fmt: skip
        read = sum(phase.read for phase in self.phases)
        operations = sum(phase.operations for phase in self.phases)
        rows.append(_row("a step", self.kernels, read, operations, self.terms(), names, self.seconds))
        return aligned(rows)


def _row(name, kernels, read, operations, terms, names, seconds) -> tuple[str, ...]:
    values = [f"{1e6 * terms.get(term, 0.0):.1f}" for term in names]
    return name, str(kernels), f"{read / 1e6:.1f}", f"{operations / 1e9:.2f}", *values, f"{1e6 * seconds:.1f}"


def aligned(rows: list[tuple[str, ...]], words: tuple[int, ...] = (0,)) -> str:
    """Columns of `words` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def merged(name: str, phases: Iterable[Phase]) -> Phase:
    """Phases of one name as one."""
    phases = list(phases)
    terms: dict[str, float] = {}
    for phase in phases:
        for term, seconds in phase.terms.items():
            terms[term] = terms.get(term, 0.0) + seconds
    read, operations = sum(phase.read for phase in phases), sum(phase.operations for phase in phases)
    return Phase(name, sum(phase.kernels for phase in phases), read, operations, terms)


def _require(condition: bool, name: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {actual!r}")
