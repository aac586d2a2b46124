"""The rows of a report, out of the JSON that a run wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from machine import BUSY
from peers.diffusion import GUIDED, SIZES


@dataclass(frozen=True)
class Image:
    """One system drawing one batch of whole images. All seconds are of the batch."""

    system: str
    own: bool
    size: str
    batch: int
    seconds: dict[str, float]
    """median, fastest, slowest, rounds"""
    parts: dict[str, float]
    floor: float | None
    times: float | None
    """How many times longer than `first` in the same rounds; None where they did not take turns."""
    first: str
    cut: bool
    """The model had fewer layers than the published one."""
    tokens_per_pass: float | None = None
    """Of an image; None where it was not recorded, or there are no passes."""
    predicted: dict[str, float] | None = None
    """Seconds of all steps by the model of benchmarks/cost.py: least and most."""

    @property
    def one_round(self) -> bool:
        """Nothing says how much such a time varies."""
        return self.seconds["rounds"] == 1

    @property
    def per_image(self) -> float:
        return self.seconds["median"] / self.batch

    @property
    def per_second(self) -> float:
        return self.batch / self.seconds["median"]

    @property
    def share(self) -> float | None:
        """Of the speed that the machine's floor allows."""
        return self.floor / self.seconds["median"] if self.floor else None


@dataclass(frozen=True)
class Operator:
    name: str
    seconds: dict[str, float]
    work: float
    unit: str
    ceiling: float
    alternatives: dict[str, dict[str, Any]]
    predicted: dict[str, float] | None = None
    """Seconds by the model of benchmarks/cost.py: least and most."""

    @property
    def rate(self) -> float:
        return self.work / self.seconds["median"]


@dataclass(frozen=True)
class Serving:
    """Systems that answer the requests of one model."""

    model: str
    precision: str
    solo: float
    """Seconds of an image alone, which loads are multiples of."""
    loads: dict[str, list[dict[str, Any]]]
    """By system: what `load.Load.summary` says of each load, with `load` and `offered`."""
    stopped: dict[str, str]
    """By system, why no higher load was tried."""
    alone: tuple[dict[str, float], dict[str, float]]
    """Seconds of a turn of `images` requests alone, through `pipe()` and through the engine."""
    times: float
    images: int
    outstanding: int
    slowest: float
    same: dict[str, int]
    """Answers to one request by several systems: how many were compared, in how many a pixel differed, by how much."""

    @property
    def name(self) -> str:
        model = self.model if self.model == "demo" else self.model.upper()
        return f"{model}, {self.precision}"


@dataclass(frozen=True)
class Report:
    run: dict[str, Any]
    """`Session.to_dict()`"""
    date: str
    commit: str
    images: list[Image]
    diffusion: list[Image]
    serving: list[Serving]
    operators: list[Operator]
    missing: dict[str, str]
    count: int
    busy: list[str]
    gpu: dict[str, dict[str, Any]]
    read_bytes: tuple[float, float] | None
    """Slowest and fastest that memory was read between rounds, bytes a second."""

    @property
    def title(self) -> str:
        machine = self.run["machine"]
        return machine["name"] + (f", {machine['threads']} threads" if machine["device"] == "cpu" else "")


LAYERS = {"b": 24, "l": 24, "xl": 32}


def collect(data: dict[str, Any]) -> Report:
    """Raises ValueError for a JSON that no run of this suite wrote."""
    if "alitok_fast" not in data or "benchmarks" not in data:
        raise ValueError("report: expected the JSON of `pytest benchmarks/ --benchmark`, got another")
    run = data["alitok_fast"]
    timed = [(bench["name"].removeprefix("bench_"), bench["extra_info"]) for bench in data["benchmarks"]]
    kinds = ("image", "diffusion", "serving", "operator")
    of_kind = {kind: [pair for pair in timed if pair[1].get("kind") == kind] for kind in kinds}
    commit = data.get("commit_info", {})
    return Report(
        run=run,
        date=data["datetime"][:10],
        commit=str(commit.get("id", "unknown"))[:10] + (" with uncommitted changes" if commit.get("dirty") else ""),
        images=[image for _, info in of_kind["image"] for image in _images(info)],
        diffusion=[image for _, info in of_kind["diffusion"] for image in _diffusion(info)],
        serving=[_serving(info) for _, info in of_kind["serving"]],
        operators=[_operator(name, info) for name, info in of_kind["operator"]],
        missing={f"{name}: {label}": reason for name, info in timed for label, reason in info["missing"].items()},
        count=len(timed),
        busy=[name for name, info in timed if _others(info) > BUSY],
        gpu={name: info["gpu"] for name, info in timed if info["gpu"]},
        read_bytes=_between(info["read_bytes"] for _, info in timed if "read_bytes" in info),
    )


def _between(measured: Iterable[dict[str, float]]) -> tuple[float, float] | None:
    found = list(measured)
    return (min(one["slowest"] for one in found), max(one["fastest"] for one in found)) if found else None


def _images(info: dict[str, Any]) -> list[Image]:
    first = next(iter(info["contenders"]))
    return [
        Image(
            system=name,
            own=result["own"],
            size=info["size"],
            batch=info["batch"],
            seconds=result["seconds"],
            parts=_parts(result),
            floor=sum(result["floor"].values()) if result.get("floor") else None,
            times=result["times"],
            first=first,
            cut=info["layers"] < LAYERS[info["size"]],
            tokens_per_pass=result.get("tokens_per_pass"),
            predicted=result.get("predicted"),
        )
        for name, result in info["contenders"].items()
    ]


def _parts(result: dict[str, Any]) -> dict[str, float]:
    """Ours say how long their draws take; of others the tokens are one part."""
    parts = dict(result["parts"])
    if "draw" not in result:
        return parts
    tokens = parts.pop("tokens")
    return {"transformer steps": max(tokens - result["draw"], 0.0), "draw": min(result["draw"], tokens), **parts}


def _diffusion(info: dict[str, Any]) -> list[Image]:
    """Systems whose images are passes of a transformer, and a decode that is the same for all of them."""
    passes = dict(info["contenders"])
    decode = passes.pop("VAE decode")["seconds"]
    guided = {"model": GUIDED, "steps": info["steps"], "layers": info["layers"]}
    return [_by_passes({**guided, **result}, decode, info["batch"]) for result in passes.values()]


def _by_passes(system: dict[str, Any], decode: dict[str, float], batch: int) -> Image:
    """`system` holds the seconds of one of its steps."""
    model, steps, one = system["model"], system["steps"], system["seconds"]
    seconds = {key: steps * one[key] + decode[key] for key in ("median", "fastest", "slowest")}
    return Image(
        system=dit_name(model, steps),
        own=False,
        size=model,
        batch=batch,
        seconds={**seconds, "rounds": min(one["rounds"], decode["rounds"])},
        parts={"transformer steps": steps * one["median"], "VAE decode": decode["median"]},
        floor=None,
        times=None,
        first="",
        cut=system["layers"] < SIZES[model].layers,
    )


def dit_name(model: str, steps: int) -> str:
    return f"{model}, {'one step' if steps == 1 else f'{steps} steps'}, bf16"


def _serving(info: dict[str, Any]) -> Serving:
    pipe, engine = info["contenders"].values()
    keys = ("model", "precision", "solo", "loads", "stopped", "images", "outstanding", "slowest", "same")
    alone = pipe["seconds"], engine["seconds"]
    return Serving(**{key: info[key] for key in keys}, alone=alone, times=engine["times"])


def _others(info: dict[str, Any]) -> float:
    """Cores that other processes had, at the most, while a benchmark was timed."""
    rows = [row for rows in info.get("loads", {}).values() for row in rows]
    return max(one["others"] or 0.0 for one in (info, *rows))


def _operator(name: str, info: dict[str, Any]) -> Operator:
    (_, own), *others = info["contenders"].items()
    given = info["work"], info["unit"], info["ceiling"], dict(others), own.get("predicted")
    return Operator(name, own["seconds"], *given)
