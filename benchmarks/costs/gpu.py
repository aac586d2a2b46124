"""The time of a step on a GPU, as a sum over its kernels.

    a kernel = node - early launch + latency of its kind + bytes / bandwidth and operations / rate

Kernels that fetch while they compute take the larger of the last two; the fused products take one after the other,
because their arithmetic waits for the kernel ahead and their weights do not. docs/tuning.md has the table beside what
was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from costs.parts import BYTES, EIGHT_BITS, Phase, Step, Work, merged, weight_bytes

MEASURED = "measured on an H100"
FITTED = "fitted to single operators on an H100"
ASSUMED = "assumed; no GPU has run this kernel"


@dataclass(frozen=True)
class Gpu:
    """A device: per second, and seconds. The numbers are an H100's (`SOURCES`); another GPU has others."""

    read_bytes: float = 3.06e12
    bf16_flops: float = 772e12
    fp32_flops: float = 51.6e12
    node: float = 1.21e-6
    early: float = 0.92e-6
    torch_product: float = 2.3e-6
    fused: float = 0.80e-6
    fused_flops: float = 36.6e12
    cluster: float = 0.77e-6
    cluster_share: float = 0.54
    cluster_widening: float = 11e12
    attention: float = 2.93e-6
    attention_share: float = 0.89
    widening: float = 1.8e12
    elementwise: float = 1.04e-6
    draw: float = 4.8e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf") or (value == 0 and field.name in RATES):
                raise ValueError(f"{field.name}: expected a finite number above 0, got {value!r}")


RATES = ("read_bytes", "bf16_flops", "fp32_flops", "fused_flops", "cluster_share", "cluster_widening",
         "attention_share", "widening")  # fmt: skip
SOURCES = {
    "read_bytes": ("memory, bytes a second", f"{MEASURED}, torch alone"),
    "bf16_flops": ("bfloat16 products, operations a second", f"{MEASURED}, torch alone"),
    "fp32_flops": ("float32 products, operations a second", f"{MEASURED}, torch alone"),
    "node": ("a kernel that waits for the one ahead", f"{MEASURED}: a chain of 200 in a graph"),
    "early": ("what early launch saves a kernel of ours behind one of ours", f"{MEASURED}: a step with and without"),
    "torch_product": ("latency of torch's product", f"{FITTED}: B's w1 at 2 to 512 rows"),
    "fused": ("latency of a fused product", f"{FITTED}: the four of a block, bfloat16 and int8"),
    "fused_flops": ("operations a second of a fused product, behind the wait", "fitted with it"),
    "cluster": ("latency of a fused product by clusters", f"{ASSUMED}: its author's estimate"),
    "cluster_share": ("share of bf16_flops that it reaches", f"{ASSUMED}: its author's estimate"),
    "cluster_widening": (
        "8-bit weights that it widens a second, for each 64 inputs",
        f"{ASSUMED}: 2.6 instructions each",
    ),
    "attention": ("latency of cached_attention", f"{FITTED}: batch 1, 8, 64, 256"),
    "attention_share": ("share of the bandwidth that it reaches", "fitted with it"),
    "widening": ("8-bit numbers widened a second, in caches and weights", "fitted with e4m3 caches and int8 products"),
    "elementwise": ("latency of norms, gates and writing weights out", f"{MEASURED}: add_rms_norm at 2 rows"),
    "draw": ("latency of the draw, without top-k and top-p", f"{MEASURED}: sample_tokens at batch 1"),
}


@dataclass(frozen=True)
class Launches:
    """How a step is run: which kernels take which rows."""

    fused_rows: int
    """Up to so many inputs, products of bfloat16 weights are fused; beyond they are torch's."""
    fused_rows_8: int
    """The same of 8-bit weights; beyond they are written out in bfloat16."""
    kept: bool
    """Whether they are written out once, and not in each step."""
    cluster_rows: int | None
    """From so many inputs on, fused products are those by clusters; None: never, as on devices without them."""
    cluster_rows_8: int | None
    """The same of 8-bit weights."""
    head_rows: int
    """Up to so many inputs, the last norm and the head are one kernel."""
    embedded: bool
    """Whether the first fused product reads the embedding itself, without a kernel for that."""
    counters: int
    """Kernels behind the draw that count positions."""


LAUNCHES = {
    "5e0ba55": Launches(
        fused_rows=32,
        fused_rows_8=128,
        kept=False,
        cluster_rows=None,
        cluster_rows_8=None,
        head_rows=0,
        embedded=False,
        counters=2,
    ),
    "present": Launches(
        fused_rows=128,
        fused_rows_8=128,
        kept=True,
        cluster_rows=9,
        cluster_rows_8=1,
        head_rows=32,
        embedded=True,
        counters=0,
    ),
}
"""By the commit that was measured on an H100, and as a step is run since then, which no GPU has run."""


CLUSTER_TILE = 64
"""Inputs of a block of the kernel by clusters."""


class _Chain:
    """Kernels one behind the other. Early launch saves time where both neighbours are ours."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.found, self.ours = gpu, [], False

    def kernel(
        self, phase: str, ours: bool, latency: float, read: float, operations: float, spent: dict[str, float]
    ) -> None:
        early = -self.gpu.early if ours and self.ours else 0.0
        named = {"nodes": self.gpu.node, "early launch": early, "latency": latency, **spent}
        self.found.append(Phase(phase, 1, read, operations, named))
        self.ours = ours

    def simple(self, phase: str, ours: bool, latency: float, read: float) -> None:
        """One that only moves bytes."""
        self.kernel(phase, ours, latency, read, 0.0, {"bytes": read / self.gpu.read_bytes})

    def step(self) -> Step:
        names = dict.fromkeys(phase.name for phase in self.found)
        return Step(tuple(merged(name, (phase for phase in self.found if phase.name == name)) for name in names))


def larger(by_bytes: float, by_operations: float) -> dict[str, float]:
    """What a kernel that does both at once spends, under the name of the one that counts."""
    return {"bytes": by_bytes} if by_bytes >= by_operations else {"operations": by_operations}


PHASES = {"qkv": "norm + qkv", "proj": "projection + residual", "gate": "norm + gate + up", "down": "down + residual"}


def gpu_step(work: Work, gpu: Gpu, launches: Launches) -> Step:
    """A step's kernels in their order. Raises ValueError for activations beside weights, which only a CPU has."""
    if work.activations is not None:
        raise ValueError(f"activations: expected None on a GPU, got {work.activations!r}")
    chain, width, inputs = _Chain(gpu), work.config.width, work.inputs
    stream = 4.0 * inputs * width  # the residual stream, float32
    fused = inputs <= (launches.fused_rows_8 if work.weights in EIGHT_BITS else launches.fused_rows)
    fused = fused and work.weights != "float32"
    if not (fused and launches.embedded):
        chain.simple("embedding", False, 0.0, 2 * stream)
    for _ in range(work.config.num_layers):
        for name, (outputs, depth) in work.matrices().items():
            (_fused if fused else _by_torch)(chain, work, launches, name, outputs, depth)
            if name == "qkv":
                _attention(chain, work)
    logits = 4.0 * inputs * work.config.codebook_size
    read, operations = 4.0 * work.head_weights + logits, 2.0 * inputs * work.head_weights
    spent = larger(read / gpu.read_bytes, operations / gpu.fp32_flops)
    if inputs <= launches.head_rows:
        chain.ours = False  # assumed to begin when the one ahead has ended: a whole node
        chain.kernel("last norm + head", True, 0.0, read, operations, spent)
    else:
        if not fused and work.weights != "float32":
            chain.simple("last norm + head", False, 0.0, 1.5 * stream)  # what is to be added, as float32
        chain.simple("last norm + head", True, gpu.elementwise, 2 * stream)
        chain.kernel("last norm + head", False, gpu.torch_product, read, operations, spent)
    chain.simple("draw", True, gpu.draw, logits)
    for _ in range(launches.counters + (work.window > 1)):
        chain.simple("draw", False, 0.0, 0.0)
    return chain.step()


def product_terms(work: Work, gpu: Gpu, clusters: bool, outputs: int, depth: int) -> tuple[float, dict[str, float]]:
    """Of a fused product: the latency of its kind, and what it spends by term."""
    weights, read = outputs * depth, weight_bytes(outputs, depth, work.weights)
    rate = gpu.cluster_share * gpu.bf16_flops if clusters else gpu.fused_flops
    terms = {"bytes": read / gpu.read_bytes, "operations": 2.0 * work.inputs * weights / rate}
    if work.weights in EIGHT_BITS:
        tiles = -(-work.inputs // CLUSTER_TILE)  # of inputs; each widens the weights for itself
        terms["widening"] = tiles * weights / gpu.cluster_widening if clusters else weights / gpu.widening
    return gpu.cluster if clusters else gpu.fused, terms


def by_clusters(work: Work, launches: Launches) -> bool:
    first = launches.cluster_rows_8 if work.weights in EIGHT_BITS else launches.cluster_rows
    return first is not None and work.inputs >= first


def _fused(chain: _Chain, work: Work, launches: Launches, name: str, outputs: int, depth: int) -> None:
    latency, terms = product_terms(work, chain.gpu, by_clusters(work, launches), outputs, depth)
    read, operations = weight_bytes(outputs, depth, work.weights), 2.0 * work.inputs * outputs * depth
    chain.kernel(PHASES[name], True, latency, read, operations, terms)


def _by_torch(chain: _Chain, work: Work, launches: Launches, name: str, outputs: int, depth: int) -> None:
    """Norm and gate by kernels of their own, each product torch's; 8-bit weights are written out before it."""
    gpu, inputs, phase = chain.gpu, work.inputs, PHASES[name]
    size = BYTES["float32" if work.weights == "float32" else "bfloat16"]
    rate = gpu.fp32_flops if work.weights == "float32" else gpu.bf16_flops
    if name in ("qkv", "gate"):  # stream and what is added to it, then both written
        chain.simple(phase, True, gpu.elementwise, inputs * depth * (2 * 4.0 + 2 * size))
    count = 2 if name == "gate" else 1
    for _ in range(count):
        weights = outputs // count * depth
        if (
            work.weights in EIGHT_BITS and not launches.kept
        ):  # scales repeated, weights widened, their product: 2, 3 and 6 bytes a weight
            for each in (2, 3, 6):
                chain.simple(phase, False, gpu.elementwise, each * weights)
        read = float(size * (weights + inputs * (depth + outputs // count)))
        operations = 2.0 * inputs * weights
        spent = larger(read / gpu.read_bytes, operations / rate)
        chain.kernel(phase, False, gpu.torch_product, read, operations, spent)
    if name == "gate":
        chain.simple(phase, True, gpu.elementwise, 3.0 * size * inputs * outputs // 2)


def attention_terms(work: Work, gpu: Gpu) -> tuple[float, dict[str, float]]:
    """Bytes of a layer's keys and values, and what is spent on them. Each input of a window reads for itself: what the
    second-level cache gives it back is not counted."""
    values = 2.0 * work.inputs * work.seen * work.config.width
    read = values * BYTES[work.cache_format]
    spent = larger(read / (gpu.attention_share * gpu.read_bytes), work.attention_operations() / gpu.fp32_flops)
    widening = values / gpu.widening if BYTES[work.cache_format] == 1 else 0.0
    return read, spent if widening <= max(spent.values()) else {"widening": widening}


def _attention(chain: _Chain, work: Work) -> None:
    read, terms = attention_terms(work, chain.gpu)
    chain.kernel("attention", True, chain.gpu.attention, read, work.attention_operations(), terms)


def persistent_step(work: Work, gpu: Gpu, barrier: float, ahead: bool) -> Step:
    """A step as one kernel that stays (docs/megakernel.md): assumed throughout. Between two phases all wait for
    `barrier` seconds. With `ahead`, weights flow without a pause, whatever phase it is, and only what the rest does not
    hide of them counts; else each phase reads its own, as a kernel does. Products are as in LAUNCHES["present"]."""
    if not 0 <= barrier < float("inf"):
        raise ValueError(f"barrier: expected a finite number of seconds >= 0, got {barrier!r}")
    if work.weights == "float32":
        raise ValueError("weights: expected bfloat16 or 8 bits, got 'float32'")
    layers, clusters = work.config.num_layers, by_clusters(work, LAUNCHES["present"])
    found, weights = [Phase("launch", 1, 0.0, 0.0, {"nodes": gpu.node})], 0.0

    def phase(name: str, count: int, read: float, operations: float, latency: float, terms: dict[str, float]) -> None:
        once = {"barriers": barrier, "latency": latency, **terms}
        found.append(Phase(name, 0, count * read, operations, {key: count * each for key, each in once.items()}))

    for name, (outputs, depth) in work.matrices().items():
        latency, terms = product_terms(work, gpu, clusters, outputs, depth)
        weights += layers * terms["bytes"]
        if ahead:
            terms["bytes"] = 0.0
        operations = 2.0 * layers * work.inputs * outputs * depth
        phase(PHASES[name], layers, weight_bytes(outputs, depth, work.weights), operations, latency, terms)
        if name == "qkv":
            read, terms = attention_terms(work, gpu)
            phase("attention", layers, read, layers * work.attention_operations(), gpu.attention, terms)
    read, operations = 4.0 * work.head_weights, 2.0 * work.inputs * work.head_weights
    by_bytes, by_operations = read / gpu.read_bytes, operations / gpu.fp32_flops
    weights += by_bytes
    phase("last norm + head", 1, read, operations, gpu.fused,
          {"operations": by_operations} if ahead else larger(by_bytes, by_operations))  # fmt: skip
    phase("draw + embedding", 1, 4.0 * work.inputs * work.config.codebook_size, 0.0, gpu.draw, {})
    if ahead:
        attention = next(one for one in found if one.name == "attention")
        busy = sum(attention.terms.get(term, 0.0) for term in ("bytes", "widening"))
        hidden = sum(one.seconds for one in found) - busy
        found.append(Phase("weights that nothing hides", 0, 0.0, 0.0, {"bytes": max(0.0, weights - hidden)}))
    return Step(tuple(found))
