"""The arguments of the service under Ray Serve. Nothing here imports Ray or torch."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from alitok_fast.pipelines.load_options import LoadOptions
from alitok_fast.serving.settings import ServeSettings

SERVES_OWN = {  # settings of a server of one process, and what has their place
    "host": "http_options of Serve",
    "port": "http_options of Serve",
    "max_connections": "max_ongoing_requests",
    "access_log": "logging_config of Serve",
}
SAMPLED_TOGETHER = {"cpu": 8, "cuda": 64}  # what an engine takes unless it is told otherwise
Settings = TypeVar("Settings")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas Ray Serve runs, and what each has.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """

    min_replicas: int = _setting(1, "Replicas that always run; 0 starts the first with the first request.")
    max_replicas: int = _setting(1, "Replicas under load. Not more than min_replicas: no autoscaling.")
    target_ongoing_requests: float | None = _setting(
        None, "Requests in a replica that autoscaling aims at. If not given, the images sampled at the same time."
    )
    upscale_delay_s: float = _setting(30.0, "Seconds of load before replicas are added.")
    downscale_delay_s: float = _setting(600.0, "Seconds without load before replicas are taken away.")
    max_ongoing_requests: int | None = _setting(
        None,
        "Requests that a replica is given at the same time. If not given, as many images as it samples and lets wait, "
        "and 16 more.",
    )
    num_cpus: float = _setting(1.0, "Cores of a replica; torch has as many threads, and at least one.")
    num_gpus: float | None = _setting(
        None, "GPUs of a replica, less than 1 to share one. If not given, 1 with device=cuda and 0 with device=cpu."
    )

    def __post_init__(self) -> None:
        _check("min_replicas", self.min_replicas >= 0, "at least 0", self.min_replicas)
        least = max(1, self.min_replicas)
        _check("max_replicas", self.max_replicas >= least, f"at least {least}", self.max_replicas)
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                none = f.name in ("min_replicas", "upscale_delay_s", "downscale_delay_s", "num_gpus")
                expected = "a number of at least 0" if none else "a number above 0"
                _check(f.name, math.isfinite(value) and (0 <= value if none else 0 < value), expected, value)


@dataclass(frozen=True)
class Arguments:
    """What `serve run` was given: the model, the service's limits, and the replicas."""

    load: LoadOptions
    settings: ServeSettings
    replicas: ReplicaSettings

    @property
    def images(self) -> int:
        """Images that a replica samples at the same time, unless its memory is short."""
        return self.settings.max_images or SAMPLED_TOGETHER[self.load.device]

    def deployment(self) -> dict[str, Any]:
        """The options of the deployment."""
        replicas, device = self.replicas, self.load.device
        gpus = float(device == "cuda") if replicas.num_gpus is None else replicas.num_gpus
        options: dict[str, Any] = {
            "ray_actor_options": {
                "num_cpus": replicas.num_cpus,
                "num_gpus": gpus,
                # Before torch is imported: replicas on one machine would each take all of its cores.
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(replicas.num_cpus)))}},
            },
            # A replica refuses for itself what is too much, with our answer; Serve's own would have another shape.
            "max_ongoing_requests": replicas.max_ongoing_requests or self.images + self.settings.max_queue + 16,
            # Serve waits for what runs before it calls the destructor, which closes the engine.
            "graceful_shutdown_timeout_s": self.settings.grace_seconds + 5,
            "graceful_shutdown_wait_loop_s": 1.0,
        }
        if replicas.max_replicas == replicas.min_replicas:
            return {**options, "num_replicas": replicas.min_replicas}
        scaling = {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_ongoing_requests or self.images,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        }
        return {**options, "autoscaling_config": scaling}


def arguments(given: Mapping[str, Any]) -> Arguments:
    """The arguments by name, as `serve run` (text) or a config file (numbers too) gives them.

    Raises:
        ValueError: for a name that is not there, and for a value, naming what was expected and what came.
    """
    for name, instead in SERVES_OWN.items():
        _check(name, name not in given, f"none under Ray Serve (see {instead})", given.get(name))
    names = {f.name for kind in (LoadOptions, ServeSettings, ReplicaSettings) for f in fields(kind)}
    known = sorted(names - SERVES_OWN.keys())
    for name in given:
        _check("arguments", name in known, f"one of {', '.join(known)}", name)
    made = Arguments(_made(LoadOptions, given), _made(ServeSettings, given), _made(ReplicaSettings, given))
    # Ray shows each replica its own GPUs alone, the first of which is cuda.
    _check("device", made.load.device in SAMPLED_TOGETHER, "cpu or cuda", made.load.device)
    gpus = made.replicas.num_gpus
    _check("num_gpus", gpus is None or (gpus > 0) == (made.load.device == "cuda"), "as the device has", gpus)
    return made


def _made(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(kind)
    values = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name in given:
            try:
                values[f.name] = TypeAdapter(hints[f.name]).validate_python(given[f.name])
            except ValidationError:
                _check(f.name, False, str(hints[f.name]).removeprefix("<class '").removesuffix("'>"), given[f.name])
    return kind(**values)


def _check(name: str, condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
