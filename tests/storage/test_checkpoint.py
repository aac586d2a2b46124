"""Files in the released format and our own folders: what loads, what is refused, what survives a failed write."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alitok_fast.config import TokenizerConfig, generator_preset, tokenizer_preset
from alitok_fast.models import Generator, Tokenizer, load_generator, load_tokenizer, save_model
from alitok_fast.models.loading import build
from alitok_fast.storage import checkpoint, tensor_files
from alitok_fast.storage.checkpoint import Checkpoint, read_checkpoint, recognise, write_checkpoint
from alitok_fast.storage.files import write_atomically, write_json


def meta_state(model_class, config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return model_class(config).state_dict()


@pytest.fixture(scope="module")
def demo_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Tokenizer(tokenizer_preset("demo")).state_dict()


def save(state: dict, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


# --- released files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_every_suffix_loads(tmp_path, demo_state, suffix):
    model = load_tokenizer(save(demo_state, tmp_path / f"tokenizer{suffix}"))
    assert model.config == tokenizer_preset("demo")
    assert not model.training
    assert all(torch.equal(value, demo_state[name]) for name, value in model.state_dict().items())


def test_legacy_pickle_format_loads(tmp_path, demo_state):
    path = tmp_path / "old.pth"
    torch.save(demo_state, path, _use_new_zipfile_serialization=False)
    assert load_tokenizer(path).config == tokenizer_preset("demo")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["model", "state_dict", "module."],
)
def test_training_wrappers_are_taken_off(tmp_path, demo_state, wrap):
    path = tmp_path / "wrapped.pth"
    torch.save(wrap(demo_state), path)
    assert torch.equal(load_tokenizer(path).quantize.codebook, demo_state["quantize.embedding.weight"])


@pytest.mark.parametrize("name", ["b", "l", "xl"])
def test_generator_size_is_recognised(name):
    assert recognise(meta_state(Generator, generator_preset(name))) == generator_preset(name)


@pytest.mark.parametrize("name", ["demo", "photos-64", "256", "512"])
@pytest.mark.parametrize("stage", [1, 2])
def test_tokenizer_size_and_stage_are_recognised(name, stage):
    config = replace(tokenizer_preset(name), stage=stage)
    assert recognise(meta_state(Tokenizer, config)) == config


def test_golden_keys_are_ours(golden):
    """Every key and shape of the released format, no more and no fewer (embed_prob is optional)."""
    keys = json.loads((golden / "keys.json").read_text())
    stage1 = replace(tokenizer_preset("256"), stage=1)
    models = {
        "ar_b": (Generator, generator_preset("b")),
        "ar_l": (Generator, generator_preset("l")),
        "ar_xl": (Generator, generator_preset("xl")),
        "tokenizer": (Tokenizer, tokenizer_preset("256")),
        "tokenizer_stage1": (Tokenizer, stage1),
    }
    for name, (model_class, config) in models.items():
        ours = {key: list(value.shape) for key, value in meta_state(model_class, config).items()}
        assert ours == {key: value for key, value in keys[name].items() if key in ours or key != "quantize.embed_prob"}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("present", [True, False])
def test_usage_statistics_are_optional(tiny_tokenizer, stage, present):
    model = tiny_tokenizer(stage)
    state = {name: value for name, value in model.state_dict().items() if name != "quantize.embed_prob"}
    if present:
        state["quantize.embed_prob"] = torch.rand(model.config.codebook_size)
    loaded = build(Checkpoint(model.config, state))
    if stage == 1:
        expected = state.get("quantize.embed_prob", torch.zeros(model.config.codebook_size))
        assert torch.equal(loaded.quantize.embed_prob, expected)


def test_a_size_without_preset_needs_its_config(tmp_path, tiny_generator):
    gen = tiny_generator()
    path = save(gen.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="expected a generator of a preset's size .* pass config=GeneratorConfig"):
        load_generator(path)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    torch.testing.assert_close(load_generator(path, config=gen.config)(tokens, None), gen(tokens, None))


def test_dtype_and_device_are_taken(tmp_path, demo_state):
    model = load_tokenizer(save(demo_state, tmp_path / "t.pth"), "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16


# --- our folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_folder_round_trip(tmp_path, tiny_tokenizer, stage):
    model = tiny_tokenizer(stage)
    save_model(tmp_path / "t", model, {"training": "none"})
    stored = read_checkpoint(tmp_path / "t")
    assert stored.config == model.config
    assert stored.provenance == {"training": "none"}
    loaded = load_tokenizer(tmp_path / "t")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    description = json.loads((tmp_path / "t" / "config.json").read_text())
    assert (description["kind"], description["dtype"]) == ("tokenizer", "float32")


def test_a_pipeline_folder_holds_both_parts(tmp_path, tiny_tokenizer, tiny_generator):
    save_model(tmp_path / "tokenizer", tiny_tokenizer())
    save_model(tmp_path / "generator", tiny_generator())
    assert load_tokenizer(tmp_path).config.num_tokens == load_generator(tmp_path).config.num_tokens


def test_the_wrong_kind_is_named(tmp_path, tiny_tokenizer):
    folder = save_model(tmp_path / "t", tiny_tokenizer())
    with pytest.raises(ValueError, match="path_or_name: expected a generator, got a tokenizer"):
        load_generator(folder)


NAN = float("nan")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["config"].update(depth=3), "TokenizerConfig: unknown key 'depth'"),
        (lambda d: d["config"].update({"\x1b[31m": 3}), r"unknown key '\\x1b\[31m'"),
        (lambda d: d["config"].update(stage=9), "stage: expected 1 or 2, got 9"),
        (lambda d: d["config"].update(stage=1), "stage: expected 2, as in model.safetensors, got 1"),
        (lambda d: d.update(kind="vocoder"), r"kind: expected one of \['tokenizer', 'generator'\], got 'vocoder'"),
        (lambda d: d.update(kind={}), r"kind: expected one of \['tokenizer', 'generator'\], got {}"),
        (lambda d: d.update(kind="\x1b[2J"), r"got '\\x1b\[2J'"),
        (lambda d: d.update(kind="generator", config={}), "blocks.0|embeddings.weight"),
        (lambda d: d.update(format="other"), 'expected "format": "alitok_fast"'),
        (lambda d: d.update(version=3), "version: expected at most 2, got 3; a newer alitok_fast wrote it"),
        (lambda d: d.update(version="2"), "version: expected at most 2, got 2"),
        (lambda d: d.update(version=True), "version: expected at most 2, got True"),
        (lambda d: d.pop("config"), "config: expected a dictionary, got None"),
        (lambda d: d["config"].update(decoder_layers=3), "decoder_layers: expected 2, as in model.safetensors, got 3"),
        (lambda d: d["config"].update(decoder_layers=10**9), "decoder_layers: expected at most 1024, got 1000000000"),
        (lambda d: d["config"].update(codebook_size=64), "codebook_size: expected 32, as in model.safetensors, got 64"),
        (lambda d: d["config"].update(commitment=NAN), "commitment: expected a finite number of at most 1e6, got nan"),
        (lambda d: d["config"].update(commitment=1e300), "commitment: expected a finite number .*, got 1e\\+300"),
        (lambda d: d.update(provenance=None), "provenance: expected a dictionary, got None"),
        (lambda d: d.update(provenance=[]), r"provenance: expected a dictionary, got \[\]"),
        (lambda d: d.update(provenance={"loss": NAN}), "provenance: expected finite numbers"),
        (lambda d: d.update(provenance={"data": "\ud800"}), "provenance: expected text, got half of a surrogate pair"),
        (lambda d: d.update(provenance={"classes": 5}), "provenance.classes: expected a list of names, got 5"),
        (lambda d: d.update(provenance={"classes": [1]}), r"provenance.classes: expected a list of names, got \[1\]"),
        (lambda d: d.update(provenance={"tokenizer": []}), r"provenance.tokenizer: expected text, got \[\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, tiny_tokenizer, change, message):
    folder = save_model(tmp_path / "t", tiny_tokenizer())
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"(config.json|model.safetensors): .*({message})") as caught:
        load_tokenizer(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_more_names_than_classes_are_refused(tmp_path, tiny_generator):
    with pytest.raises(ValueError, match="provenance.classes: expected at most 10 names, got 11"):
        save_model(tmp_path / "g", tiny_generator(), {"classes": list("abcdefghijk")})
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]", b'{"format": 1}', b"9" * 5000])
def test_damaged_json_is_one_line(tmp_path, tiny_tokenizer, content):
    folder = save_model(tmp_path / "t", tiny_tokenizer())
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: expected"):
        load_tokenizer(folder)


def test_folders_of_version_0_1_load(tmp_path, tiny_generator):
    """They have no version, other names and a seed in their configuration."""
    gen = tiny_generator()
    folder = save_model(tmp_path / "g", gen, {"classes": ["a"]})
    description = json.loads((folder / "config.json").read_text())
    del description["version"]
    old = {name.removeprefix("num_"): value for name, value in description["config"].items()}
    description["config"] = {**old, "seed": 42}
    assert {"layers", "heads", "classes"} <= description["config"].keys()
    (folder / "config.json").write_text(json.dumps(description))
    loaded = load_generator(folder)
    assert loaded.config == gen.config and read_checkpoint(folder).provenance == {"classes": ["a"]}
    assert all(torch.equal(value, gen.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_sizes_are_compared_before_weights_are_read(tmp_path, tiny_generator, monkeypatch):
    folder = save_model(tmp_path / "g", tiny_generator())
    description = json.loads((folder / "config.json").read_text())
    description["config"]["num_layers"] = 1000
    (folder / "config.json").write_text(json.dumps(description))

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(tensor_files, "_read_entry", read)
    with pytest.raises(ValueError, match="config.json: num_layers: expected 2, as in model.safetensors, got 1000"):
        load_generator(folder)


def test_a_folder_without_weights_is_refused(tmp_path, tiny_tokenizer):
    folder = save_model(tmp_path / "t", tiny_tokenizer())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="without model.safetensors"):
        load_tokenizer(folder)


# --- bad files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file_is_refused(tmp_path, demo_state, suffix, keep):
    path = save(demo_state, tmp_path / f"t{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=rf"{path.name}: expected .*, got a"):
        load_tokenizer(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 99, b"\x89PNG\r\n\x1a\n" + bytes(999), os.urandom(4096)])
def test_foreign_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}: expected"):
        load_tokenizer(path)


class Malice:
    """Unpickling this would create the file it names."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("write", ["torch.save", "pickle", "nested"])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, demo_state, write):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    if write == "pickle":
        path.write_bytes(pickle.dumps(Malice(marker)))
    else:
        torch.save({**demo_state, "x": Malice(marker)} if write == "nested" else Malice(marker), path)
    with pytest.raises(ValueError, match="evil.pth: expected .* refused, nothing was executed"):
        load_tokenizer(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if write != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was a live one


def test_other_dictionaries_are_refused(tmp_path, demo_state):
    for content, message in [
        ({"weight": torch.zeros(2)}, "expected an AliTok tokenizer or generator, got tensors named weight"),
        ([1, 2], "x.pth: expected a dictionary of tensors, got a list"),
        ({"a": 1}, "expected a dictionary of tensors, got a dictionary of a"),
        ({1: torch.zeros(1)}, "expected a dictionary of tensors, got a dictionary of 1"),
        ({}, "expected a dictionary of tensors, got an empty dictionary"),
    ]:
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "x.pth")


def test_wrong_shapes_are_named(tmp_path, demo_state):
    state = dict(demo_state)
    state["decoder.ln_post.weight"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"decoder.ln_post.weight: expected shape \(128,\), got \(7,\)"):
        load_tokenizer(save(state, tmp_path / "t.pth"))
    state = {**demo_state, "decoder.surprise": torch.zeros(7)}
    with pytest.raises(ValueError, match="decoder.surprise: unexpected"):
        load_tokenizer(save(state, tmp_path / "t.pth"))


def test_mangled_files_never_raise_anything_but_value_errors(tmp_path, demo_state):
    """Tensors missing or misshapen in the very places where the size is read from."""
    for name in (name for name in demo_state if ".transformer." not in name):
        broken = {key: value for key, value in demo_state.items() if key != name}
        with pytest.raises(ValueError):
            build(Checkpoint(recognise(broken), broken))
        broken[name] = torch.zeros(())
        with pytest.raises(ValueError):
            build(Checkpoint(recognise(broken), broken))


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected 'demo', 'photos-64', a checkpoint file or folder, or a hub repository id"
    ):
        load_tokenizer(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="got the preset 'xl', whose weights are not shipped"):
        load_generator("xl")
    with pytest.raises(FileNotFoundError, match="expected a model with a generator, got 'photos-64', which has none"):
        load_generator("photos-64")
    (tmp_path / "t.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a file ending in one of .safetensors, .pth, .pt, .bin, got t.ckpt"):
        load_tokenizer(tmp_path / "t.ckpt")


# --- the hub --------------------------------------------------------------------------------------------------------


def test_missing_huggingface_hub_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install .*\[hub\]'"):
        load_tokenizer("someone/alitok")


def test_a_repository_is_fetched_and_loaded(monkeypatch, tmp_path, tiny_tokenizer):
    save_model(tmp_path / "tokenizer", tiny_tokenizer())
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(repository, allow_patterns):
            asked.append((repository, allow_patterns))
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert load_tokenizer("someone/alitok").config == tiny_tokenizer().config
    repository, patterns = asked[0]
    assert repository == "someone/alitok"
    assert "tokenizer/model.safetensors" in patterns


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, tiny_tokenizer, monkeypatch):
    model = tiny_tokenizer()
    folder = save_model(tmp_path / "t", model)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, tiny_tokenizer(codebook_size=64))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name, reason",
    [
        ("a.pth", ", the disk may be full: .*"),
        ("a.safetensors", ", the disk may be full: .*File too large.*"),
        ("a.json", ": File too large"),
    ],
)
def test_a_full_disk_is_named(tmp_path, name, reason):
    """Files may not grow beyond a few bytes, which fails in the write itself as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path / name} was not written{reason}$"):
            if name.endswith("json"):
                write_json(tmp_path / name, {"labels": list(range(1000))})
            else:
                checkpoint.write_released(tmp_path / name, {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_kill_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from alitok_fast.storage.files import write_atomically\n"
        "def write(t): t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_files_get_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "a", lambda temporary: temporary.write_text("x"))
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_shared_and_strided_tensors_are_written(tmp_path):
    config = TokenizerConfig()
    shared = torch.arange(12.0).view(3, 4)
    write_checkpoint(tmp_path / "x", Checkpoint(config, {"a": shared, "b": shared.T}))
    state = checkpoint.read_state(tmp_path / "x" / "model.safetensors")
    assert torch.equal(state["a"].T, state["b"])
