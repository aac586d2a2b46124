"""Files that trainers write: averages, wrappers, prefixes, tied tensors; and what converting them writes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alitok_fast.config import GeneratorConfig, generator_preset
from alitok_fast.models import Generator, load_generator, load_tokenizer, save_model
from alitok_fast.models.loading import convert, open_checkpoint
from alitok_fast.storage.checkpoint import beside, read_checkpoint, read_state, write_checkpoint
from alitok_fast.storage.state_dict import unwrap


@pytest.fixture
def states():
    """(raw, average): the demo generator's weights, and others."""
    average = load_generator("demo").state_dict()
    return {name: tensor + 0.01 for name, tensor in average.items()}, average


def same(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


WITH_BOTH = {
    "model, ema": lambda raw, ema: {"model": raw, "ema": ema, "epoch": 1},
    "model, model_ema": lambda raw, ema: {"model": raw, "model_ema": ema},
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "arch": "x"},
    "nested": lambda raw, ema: {"checkpoint": 3, "state_dict": {"model": raw, "ema": ema}},
    "ema with a wrapper": lambda raw, ema: {"model_state_dict": raw, "ema_state_dict": {"decay": 0.99, "shadow": ema}},
    "averaged model": lambda raw, ema: {
        "model": raw,
        "ema": {"n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in ema.items()}},
    },
    "decay beside": lambda raw, ema: {"model": raw, "ema": ema, "ema_decay": 0.999, "use_ema": True},
    "our training state": lambda raw, ema: {
        "step": 1,
        "model": raw,
        "optimizer": {"state": {}},
        "ema": ema,
        "rng": None,
    },
}


@pytest.mark.parametrize("wrap", WITH_BOTH.values(), ids=WITH_BOTH.keys())
def test_the_average_is_taken_and_said(tmp_path, states, wrap):
    raw, average = states
    torch.save(wrap(raw, average), tmp_path / "x.pth")
    assert same(load_generator(tmp_path / "x.pth").state_dict(), average)
    assert open_checkpoint("generator", tmp_path / "x.pth").provenance["weights"] == "moving average"
    assert same(load_generator(tmp_path / "x.pth", weights="raw").state_dict(), raw)
    assert "weights" not in open_checkpoint("generator", tmp_path / "x.pth", weights="raw").provenance
    convert(tmp_path / "x.pth", tmp_path / "average")
    convert(tmp_path / "x.pth", tmp_path / "raw", weights="raw")
    assert same(load_generator(tmp_path / "average").state_dict(), average)
    assert same(load_generator(tmp_path / "raw").state_dict(), raw)
    with pytest.raises(ValueError, match="config.json: expected raw weights, got a moving average alone"):
        load_generator(tmp_path / "average", weights="raw")


def test_an_average_alone(tmp_path, states):
    torch.save({"ema": states[1]}, tmp_path / "x.pth")
    assert same(load_generator(tmp_path / "x.pth").state_dict(), states[1])
    with pytest.raises(ValueError, match="x.pth: expected raw weights, got a moving average alone, ema"):
        load_generator(tmp_path / "x.pth", weights="raw")
    with pytest.raises(ValueError, match="weights: expected one of 'ema', 'raw', got 'best'"):
        load_generator(tmp_path / "x.pth", weights="best")


def test_an_average_that_is_off_is_no_average(tmp_path, states):
    for none in (None, {}, 0.999, []):
        torch.save({"model": states[0], "ema": none}, tmp_path / "x.pth")
        assert same(load_generator(tmp_path / "x.pth").state_dict(), states[0])


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": "raw", "ema": ["list"]}, "expected a dictionary of tensors, got a list"),
        ({"model": "raw", "ema_0.9": "raw", "ema_0.99": "raw"}, "got a dictionary of model, ema_0.9, ema_0.99"),
        ({"state_dict": "raw", "model": "raw"}, "got a dictionary of state_dict, model"),
        ({"optimizer": {"state": {}}, "epoch": 3}, "got a dictionary of optimizer, epoch"),
        (
            {"model": {"epoch": 1, "generator": "raw"}},
            "expected a dictionary of tensors, got a dictionary of epoch, generator",
        ),
        ({"\x1b[31m": 1}, r"got a dictionary of \\x1b\[31m$"),
        ({"a": {"b": {"c": {"d": {"e": {"f": "raw"}}}}}}, "got a dictionary of a"),
    ],
)
def test_what_is_not_plain_is_not_guessed(tmp_path, states, content, message):
    def fill(value):
        if isinstance(value, dict):
            return {name: fill(item) for name, item in value.items()}
        return states[0] if value == "raw" else list(states[0].values()) if value == ["list"] else value

    torch.save(fill(content), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: .*{message}"):
        load_generator(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_are_taken_off(tmp_path, states, prefix, suffix):
    state = {prefix + name: value for name, value in states[1].items()}
    path = tmp_path / f"x{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    assert same(load_generator(path).state_dict(), states[1])


def test_compiled_blocks_inside_are_plain(tmp_path, states):
    gen = load_generator("demo")
    gen.blocks[0] = torch.compile(gen.blocks[0], backend="eager")
    assert any("blocks.0._orig_mod." in name for name in gen.state_dict())
    torch.save(gen.state_dict(), tmp_path / "x.pth")
    assert same(load_generator(tmp_path / "x.pth").state_dict(), states[1])


@pytest.mark.parametrize("other", ["module.output.bias", "_orig_mod.output.bias"])
def test_two_tensors_of_one_name_are_an_error(tmp_path, states, other):
    torch.save({**states[0], other: states[1]["output.bias"]}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: expected one tensor output.bias, got {other} beside it"):
        load_generator(tmp_path / "x.pth")


def test_the_references_own_trainer(tmp_path):
    state = load_tokenizer("demo").state_dict()
    content = {
        "restart_time": 0,
        "start_step": 101,
        "log_dir": "vae",
        "model_state": state,
        "criterion_state": {"discriminator.weight": torch.zeros(2)},
        "scaler_state": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(content, tmp_path / "last.pth")
    assert same(load_tokenizer(tmp_path / "last.pth").state_dict(), state)


@pytest.mark.parametrize(
    "beside_it, name", [(argparse.Namespace(lr=1), "argparse.Namespace"), (np.float64(1.5), "numpy.*scalar")]
)
def test_other_objects_are_named_in_one_line(tmp_path, states, beside_it, name):
    torch.save({"model": states[0], "args": beside_it}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: expected .* also holds a {name}; refused, nothing was") as caught:
        load_generator(tmp_path / "x.pth")
    assert "\x1b" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_other_dtypes_and_layouts_are_named(tmp_path, states):
    for tensor, got in [
        (torch.zeros(512, dtype=torch.int64), "int64, strided on cpu"),
        (torch.zeros(512).to_sparse(), "float32, sparse_coo on cpu"),
        (torch.zeros(512, dtype=torch.float8_e4m3fn), "float8_e4m3fn, strided on cpu"),
        (torch.zeros(512, device="meta"), "float32, strided on meta"),
    ]:
        torch.save({**states[0], "output.bias": tensor}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"x.pth: output.bias: expected a float16, .*, got {got}"):
            load_generator(tmp_path / "x.pth")


def test_a_small_file_gives_no_large_model(tmp_path):
    """Tensors may be views: 4 bytes that are said to be 10**6 x 10**6 numbers."""
    state = {"embeddings.weight": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match="x.pth: expected tensors of about the file's .* bytes, got 4000000000000 bytes"
    ):
        load_generator(tmp_path / "x.pth")


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_compiled_or_wrapped_model_is_written_plain(tmp_path, states):
    gen = load_generator("demo")
    holder = torch.nn.Module()
    holder.module = torch.compile(gen, backend="eager")  # as DistributedDataParallel holds it
    for number, model in enumerate((torch.compile(gen, backend="eager"), holder)):
        folder = save_model(tmp_path / str(number), model)
        assert same(read_state(folder / "model.safetensors"), states[1])
    with pytest.raises(TypeError, match="model: expected a Tokenizer or Generator, got Linear"):
        save_model(tmp_path / "x", torch.nn.Linear(2, 2))


def test_a_model_with_adapters_is_not_written(tmp_path):
    gen = load_generator("demo")
    gen.blocks[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="model: 2 tensors do not fit .*; the first: blocks.0.adapter.bias: unexpected"
    ):
        save_model(tmp_path / "x", gen)
    assert not (tmp_path / "x").exists()


def test_tied_tensors_are_written_as_copies(tmp_path, states):
    zeros = torch.zeros(10_000)
    shared = {n: zeros[: t.numel()].view(t.shape) if n.endswith("bias") else t for n, t in states[1].items()}
    torch.save(shared, tmp_path / "x.pth")
    for target in ("folder", "y.safetensors", "z.pth"):
        convert(tmp_path / "x.pth", tmp_path / target)
        assert same(load_generator(tmp_path / target).state_dict(), shared)
    gen = load_generator("demo")
    gen.blocks[0].attn.k_norm.weight = gen.blocks[0].attn.q_norm.weight
    save_model(tmp_path / "tied", gen)
    assert same(load_generator(tmp_path / "tied").state_dict(), gen.state_dict())


def test_tied_tensors_train_apart(tmp_path, states):
    """A step moves each parameter by its own gradient: those of a file must not be one memory."""
    zeros = torch.zeros(10_000)
    shared = {n: zeros[: t.numel()].view(t.shape) if n.endswith("bias") else t for n, t in states[1].items()}
    torch.save(shared, tmp_path / "x.pth")
    gen = load_generator(tmp_path / "x.pth")
    with torch.no_grad():
        gen.output.bias.add_(1)
    assert gen.blocks[0].attn.proj.bias.abs().max() == 0
    for name, parameter in gen.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize, name


def test_a_part_of_a_larger_tensor_does_not_bring_the_rest(tmp_path, states):
    large = torch.zeros(10**6)
    state = states[1] | {"output.bias": large[: len(states[1]["output.bias"])]}
    torch.save(state, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "y.pth")
    assert (tmp_path / "x.pth").stat().st_size - (tmp_path / "y.pth").stat().st_size > 3_900_000


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_converting_keeps_names_and_configuration(tmp_path, tiny_folder, suffix):
    """The released format has a place for neither; the tiny model's size is no preset's."""
    target = tmp_path / f"x{suffix}"
    assert convert(tiny_folder, target, "generator") == target
    before, after = open_checkpoint("generator", tiny_folder), open_checkpoint("generator", target)
    assert (after.config, after.provenance) == (before.config, before.provenance)
    assert after.provenance["classes"] == [f"c{i}" for i in range(10)]
    convert(target, tmp_path / "back")
    assert read_checkpoint(tmp_path / "back").provenance == before.provenance


def test_a_description_beside_a_file_is_checked(tmp_path, tiny_folder):
    target = convert(tiny_folder, tmp_path / "x.pth", "generator")
    description = json.loads(beside(target).read_text())
    for change, message in [
        ({"provenance": {"classes": 5}}, "provenance.classes: expected a list of names, got 5"),
        ({"config": {**description["config"], "num_layers": 9}}, "num_layers: expected 2, as in x.pth, got 9"),
        ({"version": 99}, "version: expected at most 2, got 99"),
        ({"bytes": 5}, "expected the description of x.pth, .* bytes, got one of a file of 5 bytes"),
    ]:
        beside(target).write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match=f"x.pth.json: {message}"):
            load_generator(target)
    beside(target).write_text("{")
    with pytest.raises(ValueError, match="x.pth.json: expected JSON"):
        load_generator(target)
    beside(target).write_text('{"mine": 1}')  # another program's
    with pytest.raises(ValueError, match="x.pth: expected a generator of a preset's size"):
        load_generator(target)


def test_convert_writes_over_its_own_kind_only(tmp_path, tiny_folder):
    folder, file = tmp_path / "hub", tmp_path / "x.pth"
    for path, taken in [(folder, "config.json"), (folder, "model.safetensors"), (file, "x.pth"), (file, "x.pth.json")]:
        mine = path / taken if path is folder else path.with_name(taken)
        mine.parent.mkdir(exist_ok=True)
        mine.write_text('{"mine": 1}')
        with pytest.raises(ValueError, match=f"target: expected a new name, .*, got {path}, where {taken} is there"):
            convert(tiny_folder, path, "generator")
        assert mine.read_text() == '{"mine": 1}' and len(os.listdir(mine.parent)) == (1 if path is folder else 3)
        mine.unlink()
        if path is folder:
            path.rmdir()
        (tmp_path / "one more").mkdir(exist_ok=True)
    convert(tiny_folder, folder, "generator")
    convert(tiny_folder, file, "generator")
    for path in (folder, file):  # our own: again, and onto itself by force only
        convert(tiny_folder, path, "generator", torch.bfloat16)
        with pytest.raises(ValueError, match="target: expected another place than the source"):
            convert(path, path, dtype=torch.float16)
        convert(path, path, dtype=torch.float16, force=True)
        assert {value.dtype for value in read_checkpoint(path).state.values()} == {torch.float16}
    file.with_name("x.pth.json").write_text('{"mine": 1}')
    convert(tiny_folder, file, "generator", force=True)
    load_generator(file)


def test_saving_leaves_other_programs_folders_alone(tmp_path, tiny_generator):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="where config.json is there already; force writes over it"):
        save_model(tmp_path, tiny_generator())
    assert os.listdir(tmp_path) == ["config.json"]
    save_model(tmp_path, tiny_generator(), force=True)
    save_model(tmp_path, tiny_generator())
    load_generator(tmp_path)


def test_the_same_model_gives_the_same_bytes(tmp_path, tiny_generator):
    files = [save_model(tmp_path / str(i), tiny_generator()) / "model.safetensors" for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_killed_writer_is_followed_by_the_next(tmp_path, tiny_generator, monkeypatch):
    """Weights are written first: killed then, it leaves them without their config.json."""
    folder = save_model(tmp_path / "run-0.1", tiny_generator())
    (folder / "config.json").unlink()
    save_model(folder, tiny_generator())
    load_generator(folder)
    (folder / "config.json").unlink()
    save_file({"mine": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="where model.safetensors is there already"):
        save_model(folder, tiny_generator())


def test_loading_takes_the_memory_of_the_model_once(tmp_path):
    """No map of the file and no second copy: the peak is little above the file."""
    config = generator_preset("demo").to_dict() | {"width": 512, "num_layers": 12}
    gen = Generator(GeneratorConfig.from_dict(config))
    folder = save_model(tmp_path / "g", gen)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 120 << 20
    program = (
        "import re, sys; from alitok_fast.models import load_generator; load_generator('demo')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1)) << 10\n"
        "before = peak(); gen = load_generator(sys.argv[1]); print(peak() - before)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, str(folder)]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    assert 0.9 * size < int(run.stdout) < 1.25 * size


def test_what_cannot_be_written_is_said_first(tmp_path, states, tiny_generator):
    for provenance in ({"path": tmp_path}, {"loss": float("nan")}, {"classes": 3}):
        with pytest.raises(ValueError, match="provenance"):
            save_model(tmp_path / "x", tiny_generator(), provenance)
    assert not (tmp_path / "x").exists()


def test_float64_is_refused_on_loading():
    for load in (load_generator, load_tokenizer):
        with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got float64"):
            load("demo", dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_loads_computes(dtype):
    gen, tokenizer = load_generator("demo", dtype=dtype), load_tokenizer("demo", dtype=dtype)
    tokens = torch.zeros(1, gen.config.num_tokens, dtype=torch.int64)
    with torch.no_grad():
        assert gen(tokens, torch.tensor([1])).isfinite().all()
    assert tokenizer.encode(tokenizer.decode(tokens).clamp(0, 1)).shape == tokens.shape


# --- the file afterwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_loaded_model_does_not_change_with_its_file(tmp_path, states, suffix):
    path = tmp_path / f"x{suffix}"
    save_file(states[1], path) if suffix == ".safetensors" else torch.save(states[1], path)
    gen = load_generator(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(1000)  # a map of the file would now end the process
    assert same(gen.state_dict(), states[1])


def test_unreadable_is_not_truncated(tmp_path, states, monkeypatch):
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"x{suffix}"
        save_file(states[1], path) if suffix == ".safetensors" else torch.save(states[1], path)
        path.chmod(0)
        refuse = type(path).open

        def open_(self, *arguments, refuse=refuse, path=path, **options):  # root may read everything
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return refuse(self, *arguments, **options)

        monkeypatch.setattr(type(path), "open", open_)
        with pytest.raises(PermissionError, match=f"x{suffix} cannot be read: Permission denied"):
            load_generator(path)
        monkeypatch.undo()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: expected a file, got something else"):
        load_generator(tmp_path / "x.pth")


def test_a_compressed_archive_is_refused(tmp_path, states):
    """torch.save compresses nothing; 4 MB could unpack into 4 GB."""
    import zipfile

    torch.save(states[1], tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as plain, zipfile.ZipFile(tmp_path / "y.pth", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="y.pth: expected a complete .pth checkpoint, got .* \\(compressed parts\\)"):
        load_generator(tmp_path / "y.pth")


def test_unwrapping_is_bounded():
    loop: dict = {}
    loop["model"] = loop
    with pytest.raises(ValueError, match="got a dictionary of model"):
        unwrap(loop, Path("x.pth"))


def test_writing_needs_no_float32(tmp_path, tiny_generator):
    """Every dtype and the empty tensor come back as they were."""
    checkpoint = read_checkpoint(save_model(tmp_path / "g", tiny_generator()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {name: value.to(dtype) for name, value in checkpoint.state.items()}
        folder = write_checkpoint(tmp_path / str(dtype), type(checkpoint)(checkpoint.config, state))
        assert same(read_checkpoint(folder).state, state)
