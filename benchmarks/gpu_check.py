"""Proves the library on a GPU, in minutes: builds, compares with definitions, golden outputs and the CPU, and times it.

    make gpu                                                         eight minutes at most
    python benchmarks/gpu_check.py --minutes 8 --out DIR             the same, results elsewhere
    python benchmarks/gpu_check.py --only sampling,attention         some parts
    python benchmarks/gpu_check.py --device cpu --quick              a rehearsal without a GPU, of the same steps

Each step is a process under a limit of its own: what fails, hangs or crashes costs that and nothing else. Results are
written after every step: gpu_check.json (all numbers), gpu_check.md (a page) and gpu_check.log.gz. A second run skips
what has passed on the same sources and the same GPU. The exit status is 0 only if every correctness step has passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

from alitok_fast.storage.files import write_atomically
from ceilings import Ceilings
from gpu import pages
from gpu.plan import PARTS, STEPS, Step, chosen
from gpu.runner import Result, Runner
from gpu.sources import CARRIED, ROOT
from machine import GpuMonitor, describe, slug

STEM, FORMAT = "gpu_check", 1
SLOWER = 3  # times the limits, for a rehearsal
WRITING_SECONDS = 3.0
SOURCES = ("alitok_fast", "benchmarks", "csrc", "tests", "CMakeLists.txt", "setup.py", "build_backend.py")
CEILINGS_STEP = "torch alone"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that all of it takes (default 8)")
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/reports/<the GPU>, "
                                                 "of a rehearsal build/gpu_check")  # fmt: skip
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, comma-separated, out of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="auto (default): the GPU; where there is none, a rehearsal")  # fmt: skip
    parser.add_argument("--reference-repo", type=Path, help="a checkout of the reference implementation, to be timed")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds; always so on the CPU")
    parser.add_argument("--again", action="store_true", help="also what has passed before on the same sources")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {given.minutes:g}")
    try:
        given.steps = chosen(given.only.split(","))
    except ValueError as error:
        parser.error(f"--{error}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cuda to be there, but torch finds no GPU; --device cpu rehearses without one")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    given.quick = given.quick or given.device == "cpu"
    if given.device == "cpu":  # the limits are those of a GPU's minutes, and cores are slow and busy as they like
        given.steps = [step.times(SLOWER) for step in given.steps]
    return given


def fingerprint() -> str:
    """Of all sources that could change a result; reports and documentation are none."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if _is_source(file)]
        for file in sorted(files):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _is_source(file: Path) -> bool:
    kinds = (".py", ".h", ".cpp", ".cu", ".json", ".safetensors")
    return file.suffix in kinds and "reports" not in file.parts and file.is_file()


def commit() -> str:
    """Where the checkout is a git repository, its commit."""
    run = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Check:
    """One run, and the files that it writes."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.given, self.device = given, torch.device(given.device)
        self.machine = describe(self.device)
        self.began = time.monotonic()
        self.about = {
            "format": FORMAT,
            "device": self.machine["name"],
            "rehearsal": given.device == "cpu",
            "quick": given.quick,
            "sources": fingerprint(),
            "commit": commit(),
        }
        reports = ROOT / "benchmarks" / "reports" / slug(self.machine)
        self.out: Path = given.out or (ROOT / "build" / STEM if given.device == "cpu" else reports)
        deadline = self.began + 60 * given.minutes - WRITING_SECONDS
        self.out.mkdir(parents=True, exist_ok=True)
        self.runner = Runner(given.device, given.quick, scratch, deadline, _environment(given))
        self.steps = self._with_ceilings(given.steps)
        self.results: dict[str, Result] = {}
        self._one_at_a_time = threading.Lock()
        self.earlier = self._earlier()

    def run(self) -> int:
        """Compilers leave a GPU alone, but not a CPU; what is not timed shares a GPU, but not a CPU."""
        build = [step for step in self.steps if step.name == "build"]
        without_it = [step for step in self.steps if step.part == "build" and step.name != "build"]
        together = [step for step in self.steps if step.part != "build" and not step.alone]
        with ThreadPoolExecutor(1 if self.device.type == "cpu" else 8) as pool:
            try:
                building = [pool.submit(self._take, step) for step in build]
                if self.device.type == "cpu":
                    _results(building)
                for step in without_it:
                    self._take(step)
                _results(building)
                _results([pool.submit(self._take, step) for step in together])
                for step in self.steps:
                    if step.name not in self.results:
                        self._take(step)
            except BaseException:
                self.runner.ended.set()
                raise
        self._write()
        print(pages.screen(self._title(), self._ordered(), self._verdict()))
        return 0 if self._proven() else 1

    def _take(self, step: Step) -> None:
        build, earlier = self.results.get("build"), self.earlier.get(step.name)
        if earlier is not None and earlier.state == "passed" and step.name != "build" and not self.given.again:
            result = earlier  # but the build is looked at again: it is cheap, and files may be gone
        elif build is not None and build.state == "failed" and step.part != "build":
            result = Result(step.name, step.part, step.required, "not run", reason="the extension was not built")
        else:
            print(f"{step.name} ...", flush=True)
            with GpuMonitor(self.device) as watched:
                result = self.runner.run(step)
            result.gpu = watched.summary
            print(pages.row(result), flush=True)  # whoever ends this early has seen so much
        with self._one_at_a_time:
            self.results[step.name] = result
            if step.name == CEILINGS_STEP:
                self._keep_ceilings(result)
            self._write()

    # ---- earlier runs ----

    def _earlier(self) -> dict[str, Result]:
        """What the file holds of runs on the same sources and GPU; what this run does not ask for stays in it."""
        try:
            last = json.loads((self.out / f"{STEM}.json").read_text())
            if any(last[key] != self.about[key] for key in ("format", "device", "quick", "sources")):
                return {}
            results = {values["name"]: Result(**{**values, "before": True}) for values in last["steps"]}
        except (OSError, ValueError, KeyError, TypeError):  # none, or not whole: everything runs again
            return {}
        pages.unpack_log(self.out / f"{STEM}.log.gz", self.runner.scratch)
        return results

    def _with_ceilings(self, steps: list[Step]) -> list[Step]:
        """Floors need the ceilings: where the parts that were asked for do not measure them, that step goes first."""
        if any(step.name == CEILINGS_STEP for step in steps):
            return steps
        return [next(step for step in STEPS if step.name == CEILINGS_STEP), *steps]

    def _keep_ceilings(self, result: Result) -> None:
        names = {field.name for field in dataclasses.fields(Ceilings)}
        found = {number["name"]: number["value"] for number in pages.numbers(result) if number["name"] in names}
        if set(found) == names:
            self.runner.ceilings.write_text(json.dumps(found))

    # ---- results ----

    def _ordered(self) -> list[Result]:
        """Of this run, and before it of those that it did not ask for."""
        known = {**self.earlier, **self.results}
        return [known[step.name] for step in STEPS if step.name in known]

    def _proven(self) -> bool:
        """Nothing failed, and what decides about correctness has passed, as far as it was asked for."""
        return all(self._stands(result) for result in self.results.values())

    def _stands(self, result: Result) -> bool:
        if result.required:
            return result.state == "passed" or (self.about["rehearsal"] and result.state == "skipped")
        return result.state != "failed"

    def _verdict(self) -> str:
        took = f"{time.monotonic() - self.began:.0f} s. Results: {self._shown(self.out)}"
        if len(self.results) < len(self.steps):  # the page of a run that was ended from outside must not say more
            return f"NOT ENDED: {len(self.results)} of {len(self.steps)} steps so far. {took}"
        if not self._proven():
            wrong = [one.name for one in self.results.values() if not self._stands(one)]
            return f"NOT PROVEN: {', '.join(wrong)}. {took}"
        asked = "" if set(self.given.only.split(",")) == set(PARTS) else f" ({self.given.only} alone)"
        if self.about["rehearsal"]:
            return f"The rehearsal passed{asked}. {pages.REHEARSAL} {took}"
        return f"Every correctness step passed{asked}. {took}"

    def _title(self) -> str:
        kind = "Rehearsal of the GPU check" if self.about["rehearsal"] else "GPU check"
        torch_version = self.machine["packages"]["torch"]
        return f"{kind}: {self.about['device']}, torch {torch_version}, commit {self.about['commit']}"

    def _facts(self) -> dict[str, str]:
        cuda = self.machine.get("cuda", {})
        return {
            "device": self.about["device"],
            "CUDA": f"driver for {cuda.get('driver')}, torch for {cuda.get('torch')}" if cuda else pages.REHEARSAL,
            "versions": ", ".join(f"{name} {version}" for name, version in self.machine["packages"].items()),
            "commit": f"{self.about['commit']}, sources {self.about['sources']}",
            "date": time.strftime("%Y-%m-%d"),
            "sizes": "quick" if self.about["quick"] else "full",
        }

    def _write(self) -> None:
        results = self._ordered()
        data: dict[str, Any] = {**self.about, "machine": self.machine, "date": time.strftime("%Y-%m-%d")}
        data["steps"] = [dataclasses.asdict(result) for result in results]
        page = pages.markdown(self._title(), self._facts(), results, self._verdict())
        for suffix, text in (("json", json.dumps(data, indent=1) + "\n"), ("md", page)):
            file = self.out / f"{STEM}.{suffix}"
            write_atomically(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        pages.packed_log(self.out / f"{STEM}.log.gz", [self.runner.log(step) for step in STEPS])

    @staticmethod
    def _shown(path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _results(futures: list[Future[None]]) -> None:
    """Wait for all; raises what the first of them raised."""
    for future in futures:
        future.result()


def _environment(given: argparse.Namespace) -> dict[str, str]:
    """What the steps find in their environment, where it does not say otherwise: the golden outputs that were carried
    here, the reference's checkout, and for a rehearsal one thread, because it is of the steps and not of their speed,
    and other processes may be busy beside it."""
    wanted = {"ALITOK_GOLDEN": str(CARRIED / "golden")} if (CARRIED / "golden").is_dir() else {}
    wanted |= {"ALITOK_REFERENCE_REPO": str(given.reference_repo.resolve())} if given.reference_repo else {}
    wanted |= {"OMP_NUM_THREADS": "1"} if given.device == "cpu" else {}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"--out: expected a folder that can be written, got {given.out} ({error.strerror})")
    with tempfile.TemporaryDirectory() as scratch:
        return Check(given, Path(scratch)).run()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way is ended too
    sys.exit(main())
