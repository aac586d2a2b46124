"""Damaged and hostile model files: each gives a model, or one line (ValueError, OSError) that names the file.

The mutations are derandomised: every run tries the same cases. The normal run tries about 300, `-m slow` ten times as
many.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from alitok_fast.config import GeneratorConfig
from alitok_fast.models import Generator, load_generator
from alitok_fast.storage.checkpoint import Checkpoint, write_checkpoint, write_file

CASES, TIMES = 50, 10
MEMORY = 3 << 30  # bytes of address space beyond what the process has
SECONDS = 20
TINY = GeneratorConfig(width=16, num_layers=2, num_heads=2, grid=2, codebook_size=8, num_classes=3, hidden_multiple=8)


def cases(count: int):
    # No deadline: a case that hangs is ended by the alarm, and the machine may be busy.
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model/ (a folder of ours), x.pth with its description, old.pth in the format before zip archives."""
    torch.manual_seed(0)
    checkpoint = Checkpoint(TINY, Generator(TINY).state_dict(), {"classes": ["a", "b", "c"], "tokenizer": "0" * 16})
    root = tmp_path_factory.mktemp("files")
    write_checkpoint(root / "model", checkpoint)
    write_file(root / "x.pth", checkpoint)
    torch.save(checkpoint.state, root / "old.pth", _use_new_zipfile_serialization=False)
    return root


@pytest.fixture(autouse=True)
def bounded_memory():
    """A case that wants much more memory than its file fails with MemoryError, which is none of the allowed errors."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def loads_or_says(path: Path, names: tuple[str, ...], config: GeneratorConfig | None = None) -> None:
    def hang(*_):
        pytest.fail(f"still loading after {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        gen = load_generator(path, config=config)
        assert sum(p.numel() for p in gen.parameters()) < 10**6
        # A batch of one token: what loads can be used, unless its numbers are the damage.
        with torch.no_grad():
            gen(torch.zeros(1, 1, dtype=torch.int64), None)
    except (ValueError, OSError) as error:
        text = str(error)
        assert any(name in text for name in names), text
        assert len(text.splitlines()) == 1 and len(text) < 2000, text
        assert text.isprintable(), text
    finally:
        signal.alarm(0)


# --- mutations ------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.just("\x1b]0;x\x07" * 99))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """`data` with some bytes changed, removed, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        # Where the structure is: near the start or the end as often as anywhere.
        at = draw(st.sampled_from([at, min(at % 64, len(data)), max(len(data) - 1 - at % 256, 0)]))
        kind = draw(st.sampled_from(["change", "cut", "remove", "insert", "double", "zero"]))
        if kind == "change":
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 4 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=64)) + data[at:]
        elif kind == "double":
            data = data[:at] + data[at : at + 64] + data[at:]
        else:
            data = data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]
    return data


@st.composite
def changed_json(draw, value):
    """A JSON value with another value somewhere in it, or a key removed, renamed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        inner = value
        while isinstance(inner, dict) and inner:
            key = draw(st.sampled_from(sorted(inner)))
            if isinstance(inner[key], dict) and draw(st.integers(0, 3)):
                inner = inner[key]
                continue
            kind = draw(st.sampled_from(["set", "set", "set", "remove", "rename", "add", "more"]))
            if kind == "more" and type(inner[key]) is int:
                inner[key] = inner[key] * draw(st.sampled_from([2, 10, 1000, 10**9]))
            elif kind == "remove":
                del inner[key]
            elif kind == "rename":
                inner[draw(st.text(max_size=10))] = inner.pop(key)
            elif kind == "add":
                inner[draw(st.text(max_size=10))] = draw(VALUES)
            else:
                inner[key] = draw(VALUES)
            break
    return value


def write_in(root: Path, name: str, data: bytes, of: Path, others: tuple[str, ...] = ()) -> Path:
    """A folder like `of` (or with the files `others` of it) in which `name` holds `data`."""
    target = root / "case"
    target.mkdir(exist_ok=True)
    for other in others:
        (target / other).write_bytes((of / other).read_bytes())
    (target / name).write_bytes(data)
    return target


# --- what is mutated ------------------------------------------------------------------------------------------------


def config_bytes(draw: Callable, folder: Path, tmp: Path) -> None:
    data = draw(changed_bytes((folder / "model" / "config.json").read_bytes()))
    loads_or_says(write_in(tmp, "config.json", data, folder / "model", ("model.safetensors",)), ("config.json",))


def config_values(draw: Callable, folder: Path, tmp: Path) -> None:
    value = json.loads((folder / "model" / "config.json").read_text())
    if draw(st.integers(0, 2)):
        value["config"] = draw(changed_json(value["config"]))
    else:
        value = draw(changed_json(value))
    data = json.dumps(value).encode()
    case = write_in(tmp, "config.json", data, folder / "model", ("model.safetensors",))
    loads_or_says(case, ("config.json", "model.safetensors", "expected a generator, got a tokenizer"))


def weights_bytes(draw: Callable, folder: Path, tmp: Path) -> None:
    data = draw(changed_bytes((folder / "model" / "model.safetensors").read_bytes()))
    case = write_in(tmp, "model.safetensors", data, folder / "model", ("config.json",))
    loads_or_says(case, ("model.safetensors",))


def weights_header(draw: Callable, folder: Path, tmp: Path) -> None:
    data = (folder / "model" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(draw(changed_json(json.loads(data[8 : 8 + length])))).encode()
    data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    case = write_in(tmp, "model.safetensors", data, folder / "model", ("config.json",))
    loads_or_says(case, ("model.safetensors",))


def weights_tensors(draw: Callable, folder: Path, tmp: Path) -> None:
    """Whole files that hold other tensors than the configuration says."""
    state = Generator(TINY).state_dict()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(state)))
        kind = draw(st.sampled_from(["remove", "rename", "shape", "dtype", "values"]))
        tensor = state.pop(name)
        if kind == "rename":
            state[draw(st.text(max_size=12)) + name] = tensor
        elif kind == "shape":
            state[name] = torch.zeros(draw(st.lists(st.integers(0, 9), max_size=4)))
        elif kind == "dtype":
            state[name] = tensor.to(draw(st.sampled_from([torch.int8, torch.bool, torch.float64, torch.float16])))
        elif kind == "values":
            value = draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
            state[name] = torch.full_like(tensor, value if tensor.is_floating_point() else 1)
        if not state:
            return
    case = write_in(tmp, "model.safetensors", save(state), folder / "model", ("config.json",))
    loads_or_says(case, ("model.safetensors",))


def pickle_bytes(draw: Callable, folder: Path, tmp: Path) -> None:
    name = draw(st.sampled_from(["x.pth", "old.pth"]))
    data = draw(changed_bytes((folder / name).read_bytes()))
    loads_or_says(write_in(tmp, "x.pth", data, folder) / "x.pth", ("x.pth",), TINY)


def pickle_program(draw: Callable, folder: Path, tmp: Path) -> None:
    """The pickle inside the archive, which the archive's check sums would else protect."""
    packed = io.BytesIO()
    with zipfile.ZipFile(folder / "x.pth") as archive, zipfile.ZipFile(packed, "w") as target:
        for part in archive.namelist():
            data = archive.read(part)
            target.writestr(part, draw(changed_bytes(data)) if part.endswith("data.pkl") else data)
    loads_or_says(write_in(tmp, "x.pth", packed.getvalue(), folder) / "x.pth", ("x.pth",), TINY)


def pickle_structure(draw: Callable, folder: Path, tmp: Path) -> None:
    """Whatever Python values a file may hold instead of the weights, or around them."""
    state = Generator(TINY).state_dict()
    around = draw(VALUES)
    key = draw(st.sampled_from(["model", "state_dict", "ema", "model_ema", "module", "x"]))
    content = draw(
        st.sampled_from([around, {key: state, "more": around}, {key: around, "model": state}, {**state, key: around}])
    )
    write_in(tmp, "x.pth", b"", folder)
    if draw(st.booleans()):
        torch.save(content, tmp / "case" / "x.pth")
    else:
        (tmp / "case" / "x.pth").write_bytes(pickle.dumps(around))
    loads_or_says(tmp / "case" / "x.pth", ("x.pth",), TINY)


def description_beside(draw: Callable, folder: Path, tmp: Path) -> None:
    if draw(st.booleans()):
        data = draw(changed_bytes((folder / "x.pth.json").read_bytes()))
    else:
        data = json.dumps(draw(changed_json(json.loads((folder / "x.pth.json").read_text())))).encode()
    case = write_in(tmp, "x.pth.json", data, folder, ("x.pth",))
    loads_or_says(case / "x.pth", ("x.pth",))


TARGETS = [
    config_bytes,
    config_values,
    weights_bytes,
    weights_header,
    weights_tensors,
    pickle_bytes,
    pickle_program,
    pickle_structure,
    description_beside,
]


def run(target, count: int, folder: Path, tmp_path: Path) -> None:
    @cases(count)
    @given(st.data())
    def case(data):
        target(data.draw, folder, tmp_path)

    case()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_model_files(target, folder, tmp_path):
    run(target, CASES * 6 // len(TARGETS), folder, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_many_model_files(target, folder, tmp_path):
    run(target, TIMES * CASES * 6 // len(TARGETS), folder, tmp_path)
