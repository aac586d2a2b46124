"""The steps of the GPU check, in the order in which they tell most, each with its own limit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

PARTS = ("build", "ops", "models", "sampling", "peers", "operators", "attention", "training", "sanitizer", "ncu")
CUDA_TESTS = (
    "tests/ops",
    "tests/models",
    "tests/inference",
    "tests/pipelines/test_pipeline.py",
    "tests/serving/test_engine.py",
    "tests/training",
)
# In a test's name, its file's or its parameters; what is left out computes on the CPU what a GPU would round.
MEET_A_GPU = "(cuda and not precisions_of_cuda) or test_graphs_decode or test_two_threads"
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a tensor's neighbours are torch's memory too


@dataclass(frozen=True)
class Step:
    """One process (and, after a crash, another for the items that are left).

    `module` is a module of items in this package; `tests` are files for pytest instead. A `required` step decides
    about the exit status: it must have passed, now or before on the same sources.
    """

    name: str
    part: str
    limit: float
    """Seconds for all of it."""
    item_limit: float = 60.0
    """Seconds for one item."""
    module: str = ""
    tests: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    """Of the module; all where there are none."""
    required: bool = False
    alone: bool = True
    """It measures times. What does not shares the GPU with others of its kind."""
    environment: dict[str, str] = field(default_factory=dict)

    def times(self, factor: float) -> Step:
        """The step with limits so many times as long."""
        return replace(self, limit=factor * self.limit, item_limit=factor * self.item_limit)


STEPS = (
    Step("build", "build", 180, 170, "gpu.build", required=True),
    Step("torch alone", "build", 90, 60, "gpu.torch_alone"),
    Step("operators against definitions", "ops", 90, 40, "gpu.check_operators", required=True, alone=False,
         environment={"CUDA_LAUNCH_BLOCKING": "1"}),
    Step("whole models", "models", 120, 80, "gpu.check_models", required=True, alone=False),
    Step("tests", "ops", 120, 120, tests=CUDA_TESTS, required=True, alone=False, environment={"OMP_NUM_THREADS": "2"}),
    Step("memcheck", "sanitizer", 100, 100, "gpu.tools", items=("memcheck",), alone=False, environment=NO_CACHE),
    Step("racecheck", "sanitizer", 100, 100, "gpu.tools", items=("racecheck",), alone=False, environment=NO_CACHE),
    Step("steps and decode", "sampling", 110, 30, "gpu.time_sampling"),
    Step("operators", "operators", 45, 20, "gpu.time_operators"),
    Step("attention", "attention", 45, 20, "gpu.time_attention"),
    Step("a step of training", "training", 60, 40, "gpu.time_training"),
    Step("torch.compile beside ours", "sampling", 120, 70, "gpu.time_baseline"),
    Step("reference and diffusion", "peers", 120, 45, "gpu.time_peers"),
    Step("Nsight Compute", "ncu", 90, 45, "gpu.tools",
         items=("ncu cached_attention_kernel", "ncu forward_kernel", "ncu grad_kv_kernel")),
)  # fmt: skip


def chosen(parts: Iterable[str]) -> list[Step]:
    """The steps of these parts. Raises ValueError for a part that there is not."""
    parts = list(parts)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"only: expected parts out of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return [step for step in STEPS if step.part in parts]


def pytest_arguments(step: Step, cuda: bool, junit: str) -> list[str]:
    """On a GPU the tests that meet it, with their names; in a rehearsal a quick file of them."""
    arguments = ["-q", "--maxfail=20", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    if not cuda:
        return [*arguments, "tests/inference/test_quantized_generator.py"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", "6"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        arguments += ["--timeout=60", "--timeout-method=thread"]
    large = "tests/ops/test_large_sizes.py"  # 30 to 40 GiB and minutes, for a GPU without a clock beside it
    return [*arguments, "-k", MEET_A_GPU, f"--ignore={large}", *step.tests]
