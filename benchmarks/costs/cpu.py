"""The time of a pass on a CPU: `decode` streams packed weights once for all inputs, and meets no kernels' launches.

    a product = max(bytes / bandwidth, operations / rate); attention = max(bytes / bandwidth, operations / rate)

The waits of the threads for each other, six a layer, are left out: at B's sizes they are below the spread of the
measurements. They would count for models as small as the demo.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from costs.parts import BYTES, Phase, Step, Work, weight_bytes

FITTED = "fitted to `decode` on 2 threads of an AMD EPYC, for B"


@dataclass(frozen=True)
class Cpu:
    """Measured ceilings a second, and the shares of them that `decode` reaches (`SOURCES`)."""

    read_bytes: float
    fp32_flops: float
    bf16_flops: float
    int8_flops: float
    stream_share: float = 0.85
    product_share: float = 0.81
    narrow_share: float = 0.68
    attention_share: float = 0.14

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{field.name}: expected a finite number above 0, got {value!r}")


SOURCES = {
    "read_bytes": ("memory, bytes a second", "measured between the rounds"),
    "fp32_flops": ("float32 multiply-adds, operations a second", "measured in the run"),
    "bf16_flops": ("bfloat16 dot products; int8 weights with 16-bit activations too", "measured in the run"),
    "int8_flops": ("8-bit weights with 8-bit activations", "measured in the run"),
    "stream_share": ("share of the bandwidth, of weights", f"{FITTED} at batch 1"),
    "product_share": ("share of the rate, of products", f"{FITTED} at batch 32"),
    "narrow_share": ("share of the rate, of products with 8-bit activations", f"{FITTED}, 2 x 16 and 64 x 1 inputs"),
    "attention_share": ("share of fp32_flops, of attention and what surrounds it", f"{FITTED} at batch 32"),
}


def cpu_step(work: Work, cpu: Cpu) -> Step:
    """A pass. Raises ValueError for formats that `decode` does not have."""
    if work.weights not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"weights: expected float32, bfloat16 or int8 on a CPU, got {work.weights!r}")
    if work.cache_format not in ("float32", "bfloat16"):
        raise ValueError(f"cache: expected float32 or bfloat16 on a CPU, got {work.cache_format!r}")
    if work.activations is not None and work.weights != "int8":
        raise ValueError(f"activations: expected None beside {work.weights} weights, got {work.activations!r}")
    layers, width = work.config.num_layers, work.config.width
    phases = []
    for name, (outputs, depth) in work.matrices().items():
        # Of an output of int8 weights: also the sum of its weights.
        read = weight_bytes(outputs, depth, work.weights) + (4.0 * outputs if work.weights == "int8" else 0.0)
        phases.append(_product(work, cpu, name, layers, read, outputs * depth, work.weights, work.activations))
        if name == "qkv":
            stored = 2.0 * work.rows * (work.before + work.window) * width * BYTES[work.cache_format]
            operations = work.attention_operations()
            spent = _larger(stored / cpu.read_bytes, operations / (cpu.attention_share * cpu.fp32_flops), layers)
            phases.append(Phase("attention", 0, layers * stored, layers * operations, spent))
    head = "bfloat16" if work.weights == "int8" else work.weights
    read = weight_bytes(work.config.codebook_size, width, head)
    phases.append(_product(work, cpu, "head", 1, read, work.head_weights, head, None))
    return Step(tuple(phases))


def _product(work, cpu, name, count, read, weights, fmt, activations) -> Phase:
    operations = 2.0 * work.inputs * weights
    if activations is not None:
        rate = cpu.narrow_share * cpu.int8_flops
    else:
        rate = cpu.product_share * (cpu.fp32_flops if fmt == "float32" else cpu.bf16_flops)
    spent = _larger(read / (cpu.stream_share * cpu.read_bytes), operations / rate, count)
    return Phase(name, 0, count * read, count * operations, spent)


def _larger(by_bytes: float, by_operations: float, count: int) -> dict[str, float]:
    bytes_count = by_bytes >= by_operations
    return {"bytes": count * by_bytes * bytes_count, "operations": count * by_operations * (not bytes_count)}
