"""The settings of the HTTP service. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

API_KEYS = "ALITOK_API_KEYS"
LARGEST = 1e6  # of seconds and of millions
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ServeSettings:
    """Limits of the HTTP service, and where it listens.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 is reached from other machines.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one and prints it.")
    allowed_hosts: str | None = _setting(
        None,
        "Names, with commas between them, by which clients call the server, as a proxy before it hands them on. If not "
        "given, those of loopback where it listens there, otherwise any.",
    )
    name: str | None = _setting(None, "Name of the model in answers. If not given, that of --model, without folders.")
    stage1: str | None = _setting(None, "Causal (stage-1) tokenizer that paints rows. If not given, that of --model.")
    max_images: int | None = _setting(
        None, "Images sampled at the same time. If not given, 8 on a CPU, 64 on a GPU, or what fits in memory."
    )
    max_queue: int = _setting(256, "Images that may wait; more are refused with status 503.")
    timeout: float = _setting(120.0, "Seconds that a request may take; then it gets status 504.")
    max_n: int = _setting(10, "Images of one request, as far as max_queue allows.")
    max_body_mb: float = _setting(16.0, "Megabytes of a request's body; more are refused with status 413.")
    max_bodies_mb: float = _setting(256.0, "Megabytes of all bodies at a time; further ones get status 503.")
    max_megapixels: float = _setting(40.0, "Millions of pixels of a picture that is sent; more are refused.")
    max_connections: int = _setting(1024, "Connections at the same time; further ones get status 503.")
    stall_seconds: float = _setting(
        30.0, "A body may take so long; a connection on which nothing is sent or read for so long ends."
    )
    grace_seconds: float = _setting(30.0, "After SIGTERM, what runs may take so long to finish.")
    api_keys: str | None = _setting(None, f"File with a key per line, for /v1; besides those in {API_KEYS}.")
    access_log: bool = _setting(False, "Log a line for each request.")
    page: bool = _setting(True, "Serve the page at /.")

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_n", "max_connections"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _check("max_images", self.max_images is None or self.max_images >= 1, "at least 1", self.max_images)
        _check("port", 0 <= self.port < 65536, "a number in [0, 65536)", self.port)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, float):
                _check(f.name, 0 < value <= LARGEST, f"a number above 0, at most {LARGEST:g}", value)
        enough = f"at least max_body_mb, {self.max_body_mb:g}"
        _check("max_bodies_mb", self.max_bodies_mb >= self.max_body_mb, enough, self.max_bodies_mb)
        names = all(self._allowed()) and not set(self.allowed_hosts or "") & set("/*")
        _check("allowed_hosts", names, "names of hosts", self.allowed_hosts)

    def _allowed(self) -> list[str]:
        return [] if self.allowed_hosts is None else [host_name(name.strip()) for name in self.allowed_hosts.split(",")]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host.lower() == "localhost"

    def host_names(self) -> frozenset[str]:
        """Names by which clients may call the server, in lower case; empty takes any."""
        return frozenset(self._allowed() or ([*LOOPBACK, self.host.lower()] if self.on_loopback else []))

    def keys(self) -> tuple[bytes, ...]:
        """The API keys; empty where everybody may ask. Raises ValueError for a file or a variable without any."""
        given: list[str] = []
        if API_KEYS in os.environ:  # a secret that nobody filled in must not open the server
            given = [key.strip() for key in os.environ[API_KEYS].split(",")]
            _check(API_KEYS, any(given), "keys with commas between them, or no such variable", os.environ[API_KEYS])
        if self.api_keys is not None:
            try:
                lines = [line.strip() for line in Path(self.api_keys).read_text(encoding="utf-8-sig").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_keys: expected a file with a key per line, got {error}") from None
            _check("api_keys", any(lines), "a file with a key per line", self.api_keys)
            given += lines
        return tuple(os.fsencode(key) for key in given if key)


def host_name(host: str) -> str:
    """The name or address in a `Host` header, in lower case and without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return (host if host.count(":") > 1 else host.partition(":")[0]).lower().rstrip(".")


def _check(name: str, condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
