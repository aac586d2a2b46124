"""A model of the time of a step: its kernels, bytes and operations by phase, priced by a device's measured ceilings.

    python benchmarks/cost.py --size b --batch 1 8 64                  an H100, as a step is run now
    python benchmarks/cost.py --launches 5e0ba55 --cache float8_e4m3fn as it was run when it was measured
    python benchmarks/cost.py --read-bytes 3.0e12 --node 1.3e-6        another GPU, by any of its numbers
    python benchmarks/cost.py --device cpu --weights int8 --window 8   a CPU, with the ceilings of a committed report
    python benchmarks/cost.py --ceilings REPORT.json                   the ceilings of a report.json or gpu_check.json
    python benchmarks/cost.py --measured                               every committed step beside its prediction
    python benchmarks/cost.py --persistent 1.25e-6                     docs/megakernel.md, by the cost of a barrier

docs/tuning.md says where each number comes from, and how far it is off.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

from alitok_fast.config import generator_preset  # noqa: E402
from costs import cpu as of_cpu  # noqa: E402
from costs import gpu as of_gpu  # noqa: E402
from costs.cpu import Cpu, cpu_step  # noqa: E402
from costs.gpu import LAUNCHES, Gpu, gpu_step, persistent_step  # noqa: E402
from costs.parts import BYTES, Step, Work, aligned  # noqa: E402
from costs.reports import (  # noqa: E402
    EPYC,
    H100,
    REPORTS,
    ceilings_of,
    commit_of,
    cpu_of,
    cpu_points,
    gpu_of,
    gpu_points,
    markdown,
)


def predict(work: Work, device: Gpu | Cpu, launches: str = "present") -> Step:
    """A step on a GPU or a CPU; `launches` names how a GPU runs it (`LAUNCHES`)."""
    if launches not in LAUNCHES:
        raise ValueError(f"launches: expected one of {', '.join(LAUNCHES)}, got {launches!r}")
    return gpu_step(work, device, LAUNCHES[launches]) if isinstance(device, Gpu) else cpu_step(work, device)


def sources(device: Gpu | Cpu) -> str:
    """Every number of the model, what it is, and where it comes from."""
    known = of_gpu.SOURCES if isinstance(device, Gpu) else of_cpu.SOURCES
    rows = [(f"{name}: {known[name][0]}", f"{getattr(device, name):.4g}", known[name][1]) for name in known]
    return aligned([("number", "value", "source"), *rows], words=(0, 2))


def report(work: Work, step: Step, title: str) -> str:
    """A step's phases under a line that says what it is."""
    formats = f"{work.weights}, cache {work.cache_format}"
    formats += f", activations {work.activations}" if work.activations else ""
    line = f"{title}: batch {work.batch}, window {work.window}, {formats}: {1e3 * step.seconds:.3g} ms"
    return f"{line}\n{step.table()}"


def device_of(options: argparse.Namespace) -> Gpu | Cpu:
    """Ceilings from a report, then what the command line says otherwise."""
    default = H100 if options.device == "h100" else EPYC[0]
    ceilings = ceilings_of(options.ceilings or REPORTS / default)
    device = gpu_of(ceilings) if options.device == "h100" else cpu_of(ceilings)
    names = {field.name for field in fields(device)}
    given = {name: value for name in NUMBERS if (value := getattr(options, name)) is not None}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(f"{unknown[0]}: expected a number of the {options.device}'s model, which are {sorted(names)}")
    return replace(device, **given)


NUMBERS = sorted({field.name for kind in (Gpu, Cpu) for field in fields(kind)})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default="b", help="of the generator: b, l, xl or another preset")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    made.add_argument("--device", choices=("h100", "cpu"), default="h100", help="the kind of model")
    made.add_argument("--weights", choices=list(BYTES), default="bfloat16")
    made.add_argument("--cache", choices=list(BYTES))
    made.add_argument("--activations", choices=("int8",))
    made.add_argument("--window", type=int, default=1)
    made.add_argument(
        "--position", type=float, help="tokens before the first input; the mean over an image if left out"
    )
    made.add_argument("--launches", choices=list(LAUNCHES), default="present", help="how a GPU runs a step")
    made.add_argument("--ceilings", type=Path, help="JSON of a report")
    made.add_argument("--measured", action="store_true", help="the committed steps beside their predictions")
    made.add_argument(
        "--persistent", type=float, metavar="SECONDS", help="one kernel, with barriers of so many seconds"
    )
    for name in NUMBERS:
        made.add_argument(f"--{name.replace('_', '-')}", type=float, help=argparse.SUPPRESS)
    return made


def measured() -> str:
    """Tables in Markdown, in milliseconds."""
    parts = [f"{H100}, commit {commit_of(REPORTS / H100)}\n\n{markdown(list(gpu_points()))}"]
    parts += [f"{name}\n\n{markdown(list(cpu_points(REPORTS / name)))}" for name in EPYC]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(arguments)
    if options.measured:
        print(measured())
        return
    try:
        device, config = device_of(options), generator_preset(options.size)
        given = options.weights, options.cache, options.activations, options.window, options.position
        print(sources(device))
        for batch in options.batch:
            work = Work(config, batch, *given)
            print("\n" + report(work, predict(work, device, options.launches), options.size.upper()))
            if options.persistent is None:
                continue
            if not isinstance(device, Gpu):
                raise ValueError("persistent: expected --device h100 with it")
            for ahead in (False, True):
                title = "one kernel, weights " + ("ahead of their phase" if ahead else "in their phase")
                print("\n" + report(work, persistent_step(work, device, options.persistent, ahead), title))
    except (ValueError, OSError) as error:
        made.error(str(error))


if __name__ == "__main__":
    main()
