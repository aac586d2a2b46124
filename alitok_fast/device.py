"""Names of devices, as they are given on the command line."""

from __future__ import annotations

import os
import re

import torch


def check_device(name: str) -> str:
    """`name`, where torch can compute on it: cpu, cuda or cuda:N. Raises ValueError saying why not."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "was built without CUDA"
        raise ValueError(f"device: expected cpu, since this torch {why}, got {name!r}")
    return name


def local_device(device: str) -> str:
    """The name "cuda" becomes this process's own under torchrun."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for matrices of bfloat16; else torch multiplies their numbers one by one."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())
