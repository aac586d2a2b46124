"""Run files: what is written is read back, layers override each other in order, mistakes are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alitok_fast.config import GENERATORS, TOKENIZERS, generator_preset, tokenizer_preset
from alitok_fast.training.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
from alitok_fast.training.phases import Phase
from alitok_fast.training.run_config import RunConfig, combine
from alitok_fast.training.run_layers import Layer, preset_layer, preset_names, read_run_file, set_layer, stage_of
from alitok_fast.training.run_settings import PARTS, SECTIONS, settings_of

KINDS = ("tokenizer", "generator")


def preset(kind: str, name: str = "demo", stage: int | None = None) -> RunConfig:
    return combine(kind, [preset_layer(kind, {"model": name, "training": name}, stage)])


def written(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def of_file(folder: Path, text: str, kind: str = "tokenizer", *set_: str) -> RunConfig:
    file = read_run_file(written(folder, text), kind)
    given = [file, set_layer(kind, set_)]
    return combine(kind, [preset_layer(kind, file.presets, stage_of(given)), *given])


# --- what is written is read back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_presets_are_whole_files(tmp_path: Path, kind: str) -> None:
    """Whatever preset lies below, a file that was written decides everything."""
    for name in preset_names(kind):
        for stage in (1, 2) if kind == "tokenizer" else (None,):
            shown = preset(kind, name, stage)
            other = preset_layer(kind, {}, 2)
            assert combine(kind, [other, read_run_file(written(tmp_path, shown.to_toml()), kind)]) == shown


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_presets_of_tokenizers_are_the_published_settings(name: str, stage: int) -> None:
    shown = preset("tokenizer", name, stage)
    assert shown.model == dataclasses.replace(tokenizer_preset(name), stage=stage)
    assert shown.training == TOKENIZER_PRESETS[stage][name]


@pytest.mark.parametrize("name", GENERATORS)
def test_presets_of_generators_are_the_published_settings(name: str) -> None:
    shown = preset("generator", name)
    assert (shown.model, shown.training) == (generator_preset(name), GENERATOR_PRESETS[name])


POSITIVE = st.floats(1e-12, 1e6)
WEIGHTS = st.floats(0, 1e6)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PATHS = st.none() | st.lists(TEXT.filter(lambda t: t not in ("", ".", "..") and "/" not in t), min_size=1).map(
    lambda parts: "/" + "/".join(parts)
)


@st.composite
def phases(draw) -> Phase:
    lr = draw(POSITIVE)
    end_lr = draw(st.none() | st.floats(0, lr))
    return Phase(draw(st.integers(1, 10**9)), lr, end_lr, *(draw(WEIGHTS) for _ in range(3)))


@st.composite
def runs(draw, kind: str) -> RunConfig:
    shown = preset(kind, draw(st.sampled_from(preset_names(kind))), draw(st.sampled_from([1, 2])))
    steps, lr = draw(st.integers(1, 10**12)), draw(POSITIVE)
    training: dict[str, Any] = dict(
        steps=steps, warmup=draw(st.integers(0, steps)), lr=lr, end_lr=draw(st.floats(0, lr)),
        betas=(draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))), seed=draw(st.integers(0, 2**63 - 1)),
        compile=draw(st.booleans()), precision=draw(st.sampled_from(["fp32", "bf16"])),
    )  # fmt: skip
    model: dict[str, Any] = dict(prefix_tokens=draw(st.none() | st.integers(0, 2**16)))
    if kind == "tokenizer":
        training |= dict(phases=tuple(draw(st.lists(phases(), max_size=4))), lpips_weights=draw(PATHS) or "")
        model |= dict(causal_decoder=draw(st.none() | st.booleans()), num_buffer_tokens=draw(st.integers(0, 99)))
        start = dict(init=draw(PATHS.map(lambda p: p and "/missing" + p)))
        data = dict(path=draw(PATHS), split=draw(TEXT), workers=draw(st.none() | st.integers(0, 99)))
    else:
        start, data = {}, dict(cache=draw(PATHS))
    changes = {"model": model, "training": training, "start": start, "data": data}
    return dataclasses.replace(
        shown, **{part: dataclasses.replace(getattr(shown, part), **values) for part, values in changes.items()}
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(tmp_path: Path, kind: str, data) -> None:
    run = data.draw(runs(kind))
    read = read_run_file(written(tmp_path, run.to_toml()), kind)
    assert combine(kind, [preset_layer(kind, {}), read]) == run


def test_every_setting_is_in_the_file_once() -> None:
    for kind in KINDS:
        text = preset(kind).to_toml()
        sections = {part.splitlines()[0].strip("]"): part for part in text.split("\n[")[1:]}
        assert tuple(sections) == SECTIONS
        for setting in settings_of(kind).values():
            names = [line.lstrip("# ").partition(" = ")[0] for line in sections[setting.section].splitlines()]
            assert names.count(setting.name) == 1, setting.path
        assert len({s.path for s in settings_of(kind).values()}) == sum(
            len(dataclasses.fields(part)) for part in PARTS[kind].values()
        )


# --- layers ---------------------------------------------------------------------------------------------------------


def test_each_layer_overrides_those_before(tmp_path: Path) -> None:
    text = 'preset = "256"\n[training]\nbatch_size = 8\nema_decay = 0.5\nseed = 1\n[model]\nstage = 2\ncode_dim = 16\n'
    run = of_file(tmp_path, text, "tokenizer", "ema_decay=0.25", "training.seed=2", "model.num_buffer_tokens=64")
    published = TOKENIZER_PRESETS[2]["256"]
    assert run.training == dataclasses.replace(published, batch_size=8, ema_decay=0.25, seed=2)
    assert run.model == dataclasses.replace(tokenizer_preset("256"), code_dim=16, num_buffer_tokens=64)
    layers = [preset_layer("tokenizer", {}), Layer("a", {"training.seed": 3}), Layer("b", {"training.seed": 4})]
    assert combine("tokenizer", layers).training.seed == 4


def test_presets_of_model_and_training_may_differ(tmp_path: Path) -> None:
    run = of_file(tmp_path, 'preset = "xl"\n[model]\npreset = "b"\n', "generator")
    assert (run.model, run.training) == (generator_preset("b"), GENERATOR_PRESETS["xl"])
    run = of_file(tmp_path, '[training]\npreset = "b"\n', "generator")
    assert (run.model, run.training) == (generator_preset("demo"), GENERATOR_PRESETS["b"])


def test_phases_are_a_list_of_tables(tmp_path: Path) -> None:
    text = (
        "[[training.phases]]\nsteps = 200\nlr = 1e-4\n[[training.phases]]\nsteps = 50\nlr = 1e-5\nadversarial = 0.05\n"
    )
    training = of_file(tmp_path, text).training
    assert training.phases == (Phase(200, 1e-4), Phase(50, 1e-5, adversarial=0.05))
    assert training.steps == 250  # those of the phases, unless the file says more
    inline = "training.phases=[{steps = 200, lr = 1e-4}, {steps = 50, lr = 1e-5, adversarial = 0.05}]"
    assert of_file(tmp_path, "", "tokenizer", inline).training == training
    assert of_file(tmp_path, "[training]\nsteps = 240\n" + text).training.steps == 240
    assert of_file(tmp_path, text, "tokenizer", "steps=240").training.steps == 240
    assert of_file(tmp_path, 'preset = "256"\ntraining = {phases = []}\n').training.phases == ()


@pytest.mark.parametrize(
    "text, set_, message",
    [
        ('preset = "256"\n', ["lr=1e-3"], "--set lr: expected a run without phases, since each has its own, got one"),
        ('preset = "256"\n[training]\nend_lr = 0.0\n', [], "run.toml: training.end_lr: expected a run without phases"),
    ],
)
def test_a_learning_rate_that_phases_hide_is_refused(tmp_path: Path, text: str, set_: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path, text, "tokenizer", *set_)
    assert of_file(tmp_path, text, "tokenizer", *set_, "training.phases=[]").training.phases == ()


def test_paths_begin_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "first").mkdir()
    monkeypatch.chdir(tmp_path / "runs" / "a")
    text = (
        '[data]\npath = "../../photos"\n[model]\nstage1 = "../first"\ninit = "demo"\n'
        '[training]\nlpips_weights = "w.pth"\n'
    )
    monkeypatch.chdir(tmp_path)
    run = of_file(tmp_path / "runs" / "a", text)
    assert run.data.path == str(tmp_path / "photos")
    assert (run.start.stage1, run.start.init) == (str(tmp_path / "runs" / "first"), "demo")
    assert run.training.lpips_weights == str(tmp_path / "runs" / "a" / "w.pth")
    assert run.training.perceptual_weights == ""
    run = of_file(tmp_path / "runs" / "a", text, "tokenizer", "data.path=photos", "model.init=user/name")
    assert (run.data.path, run.start.init) == (str(tmp_path / "photos"), "user/name")
    assert of_file(tmp_path, '[data]\npath = "hf:user/name"\n').data.path == "hf:user/name"
    assert of_file(tmp_path, '[data]\npath = "x-{0..9}.tar"\n').data.path == str(tmp_path / "x-{0..9}.tar")


def test_none_is_auto(tmp_path: Path) -> None:
    text = "[model]\nprefix_tokens = 0\ncausal_decoder = false\n[data]\nworkers = 3\n"
    run = of_file(tmp_path, text)
    assert (run.model.prefix_tokens, run.model.causal_decoder, run.data.workers) == (0, False, 3)
    run = of_file(
        tmp_path, text, "tokenizer", "model.prefix_tokens=auto", "model.causal_decoder=none", "data.workers=auto"
    )
    assert (run.model.prefix_tokens, run.model.causal_decoder, run.data.workers) == (None, None, None)
    assert of_file(tmp_path, '[model]\nprefix_tokens = "auto"\n').model.num_prefix_tokens == 9


def test_the_stage_chooses_the_training_preset(tmp_path: Path) -> None:
    assert of_file(tmp_path, "[model]\nstage = 1\n").training == TOKENIZER_PRESETS[1]["demo"]
    assert (
        of_file(tmp_path, "[model]\nstage = 1\n", "tokenizer", "model.stage=2").training == TOKENIZER_PRESETS[2]["demo"]
    )


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("[modle]\n", "unknown section or key 'modle'; the nearest is 'model'"),
        ("lr = 1e-3\n", "unknown section or key 'lr'; 'lr' belongs to [training]"),
        ("[zzz]\n", "unknown section or key 'zzz'; expected one of model, training, data, evaluation, kind, preset"),
        ("[model]\nencoder_widht = 1\n", "unknown key 'encoder_widht' in [model]; the nearest is 'encoder_width'"),
        ("[model]\nlr = 1.0\n", "unknown key 'lr' in [model]; it belongs to [training]"),
        ("[training]\nlog_every = 1\n", "unknown key 'log_every' in [training]; it belongs to [evaluation]"),
        ("[model]\nnum_prefix_tokens = 1\n", "unknown key 'num_prefix_tokens' in [model]; the nearest is"),
        ('[model]\n"\\u001b[2J" = 1\n', "unknown key '\\\\x1b[2J' in [model]; expected one of image_size, "),
        ("model = 3\n", "model: expected a section, [model], got 3"),
        ("[[model]]\nstage = 1\n", "model: expected a section, [model], got a list"),
        ("preset = 256\n", "preset: expected text, got 256"),
        ("[model]\npreset = []\n", "model.preset: expected text, got a list"),
        ('kind = "generator"\n', "kind: expected 'tokenizer', as this command trains, got 'generator'"),
        ('kind = "x"\n', "kind: expected one of ('tokenizer', 'generator'), got 'x'"),
        ("[model]\nimage_size = 256.0\n", "model.image_size: expected a whole number, got 256.0"),
        ("[model]\nimage_size = true\n", "model.image_size: expected a whole number, got True"),
        ("[model]\nimage_size = 0x" + "f" * 5000, "model.image_size: expected a whole number, got a number of"),
        ("[model]\nimage_size = 250\npatch_size = 16\n", "model.image_size: expected a multiple of patch_size 16, got"),
        ("[model]\ncausal_encoder = 1\n", "model.causal_encoder: expected true or false, got 1"),
        ('[model]\nprefix_tokens = "many"\n', "model.prefix_tokens: expected a whole number or \"auto\", got 'many'"),
        ('[model]\nimage_size = "auto"\n', "model.image_size: expected a whole number, got 'auto'"),
        ("[training]\nlr = '1e-3'\n", "training.lr: expected a number, got '1e-3'"),
        ("[training]\nlr = 2024-01-01\n", "training.lr: expected a number, got datetime.date(2024, 1, 1)"),
        ("[training]\nlr = nan\n", "training.lr: expected a finite number, got nan"),
        ("[training]\nlr = -1\n", "training.lr: expected a positive number, got -1.0"),
        ("[training]\nbetas = [0.9]\n", "training.betas: expected two numbers"),
        ("[training]\nbetas = [0.9, '1']\n", "training.betas: expected a list of numbers, got a list"),
        ("[training]\nbetas = 0.9\n", "training.betas: expected a list of numbers, got 0.9"),
        ("[training]\nprecision = 16\n", "training.precision: expected text, got 16"),
        ("[training]\nphases = 3\n", "training.phases: expected a list of phases, each a table, got 3"),
        ("[training]\nphases = [3]\n", "training.phases: expected a list of phases, each a table, got 3 as number 1"),
        ("[training.phases]\nlr = 3\n", "training.phases: expected a list of phases, each a table, got a table"),
        ("[[training.phases]]\nlr = 1.0\n", "training.phases: phase 1: expected steps, got none"),
        ("[[training.phases]]\nstepz = 1\n", "training.phases: phase 1: unknown key 'stepz'; the nearest is"),
        ("[[training.phases]]\nsteps = 1\nlr = -1\n", "training.phases: phase 1: lr: expected 0 or a positive number"),
        ("[[training.phases]]\nsteps = 'x'\nlr = 1\n", "training.phases: phase 1: steps: expected a whole number"),
        ("[training]\nsteps = 30\n", "training.steps: expected at least the 100 steps of warm-up, got 30; a"),
        ("[data]\npath = 3\n", "data.path: expected text, got 3"),
        ("[data]\nworkers = {}\n", "data.workers: expected a whole number or \"auto\", got a table"),
        ("[data]\ncache = 'x'\n", "unknown key 'cache' in [data]; "),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        of_file(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'run.toml'}: {message}"), caught.value
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("lr", "--set: expected name=value, got 'lr'"),
        ("stepz=1", "--set: unknown setting 'stepz'; the nearest is 'steps'"),
        ("width=1", "--set: unknown setting 'width'; the nearest is 'model.width'"),
        ("model.widht=1", "--set: unknown key 'widht' in [model]; the nearest is 'width'"),
        ("training.width=1", "--set: unknown key 'width' in [training]; it belongs to [model]"),
        ("steps=x", "--set steps: expected a whole number such as 500000, got 'x'"),
        ("compile=maybe", "--set compile: expected true or false, got 'maybe'"),
        ("model.width=511", "--set model.width: expected a multiple of num_heads 4, got 511"),
        ("steps=30", "--set steps: expected at least the 100 steps .*, got 30; .* such as --set warmup=3$"),
        ("batch_size=-1", "--set batch_size: expected at least 1, got -1"),
    ],
)  # fmt: skip
def test_mistakes_after_set_are_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        combine("generator", [preset_layer("generator", {}), set_layer("generator", [setting])])


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config: expected a run file .*, got .*x.toml, which does not exist"):
        read_run_file(tmp_path / "x.toml", "tokenizer")
    with pytest.raises(ValueError, match="config: expected a run file .*, got the folder"):
        read_run_file(tmp_path, "tokenizer")


def test_the_stage_is_checked_before_the_preset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.toml: stage: expected 1 or 2, got 3"):
        of_file(tmp_path, "[model]\nstage = 3\n")
    with pytest.raises(ValueError, match=r"preset: expected one of \['256', '512', 'demo', 'photos-64'\], got 'b'"):
        of_file(tmp_path, '[training]\npreset = "b"\n')
    with pytest.raises(ValueError, match="name: expected a tokenizer preset out of .*, got 'b'"):
        of_file(tmp_path, '[model]\npreset = "b"\n')


def test_the_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    run = of_file(tmp_path, page.partition("```toml\n")[2].partition("```")[0])
    assert run.model == dataclasses.replace(tokenizer_preset("256"), stage=1, decoder_layers=12)
    assert [phase.adversarial for phase in run.training.phases] == [0.0, 0.05] and run.training.steps == 150_000
