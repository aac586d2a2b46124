"""from_pretrained, save_pretrained, push_to_hub: our folders with a card, against a hub that is a folder."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alitok_fast import Generator, Pipeline, Tokenizer, load_generator, load_tokenizer, save_model
from alitok_fast.models.tokenizer import encoder_fingerprint
from alitok_fast.storage.model_card import CardFields

huggingface_hub = pytest.importorskip("huggingface_hub")
REAL_API = huggingface_hub.HfApi
ROOT = Path(__file__).resolve().parents[2]


class Hub:
    """Repositories as folders, and what was asked of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def api(self, token=None) -> SimpleNamespace:
        """Whose methods take what the library's do."""
        self.calls.append(("token", token))
        names = ("create_repo", "create_branch", "file_exists", "upload_folder")
        return SimpleNamespace(**{name: checked(getattr(REAL_API, name), getattr(self, name), self) for name in names})

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("create_branch", repo_id, branch, exist_ok))

    def file_exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id, folder_path, path_in_repo, commit_message, revision, create_pr, ignore_patterns):
        self.calls.append(("upload_folder", commit_message, revision, create_pr))
        for file in folder_path.iterdir():
            if not any(fnmatch.fnmatch(file.name, pattern) for pattern in ignore_patterns or []):
                target = self.root / repo_id / (path_in_repo or "") / file.name
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        return SimpleNamespace(pr_url="hub/pr" if create_pr else None, commit_url="hub/commit")

    def snapshot_download(self, repository: str, allow_patterns: list[str], **options: object) -> str:
        self.calls.append(("snapshot_download", options))
        names = {str(file.relative_to(self.root / repository)) for file in (self.root / repository).rglob("*.*")}
        assert {"config.json", "model.safetensors"} & {Path(name).name for name in names}
        fetched = self.root / "fetched" / repository
        for name in sorted(names & set(allow_patterns)):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repository / name, fetched / name)
        return str(fetched)


def checked(real, act, *instance):
    def call(*args, **kwargs):
        inspect.signature(real).bind(*instance, *args, **kwargs)
        return act(*args, **kwargs)

    return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    fetch = checked(huggingface_hub.snapshot_download, hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return hub


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def provenance(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["provenance"]


# --- loading and saving ---------------------------------------------------------------------------------------------


def test_a_folder_is_saved_and_loaded(tmp_path: Path, tiny_tokenizer, tiny_generator) -> None:
    for kind, model in (("tokenizer", tiny_tokenizer()), ("generator", tiny_generator())):
        assert model.save_pretrained(tmp_path / kind) == tmp_path / kind
        found = type(model).from_pretrained(tmp_path / kind)
        assert same(found, model) and found.config == model.config and not found.training
        assert sorted(file.name for file in (tmp_path / kind).iterdir()) == [
            "README.md", "config.json", "model.safetensors",
        ]  # fmt: skip
        load = load_tokenizer if kind == "tokenizer" else load_generator
        assert same(load(tmp_path / kind), model)
    assert Pipeline.from_pretrained(tmp_path)([1]).pixels.shape == (1, 16, 16, 3)
    assert Tokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="path_or_name: expected a tokenizer, got a generator"):
        Tokenizer.from_pretrained(tmp_path / "generator")
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got int8"):
        Generator.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match="revison: expected an argument out of revision, token"):
        Generator.from_pretrained(tmp_path, revison="main")


def test_provenance_is_kept_with_the_weights(tmp_path: Path, tiny_generator) -> None:
    known = {"classes": ["a", "b"], "tokenizer": "abc", "data": "photos", "step": 7}
    save_model(tmp_path / "one", tiny_generator(), known)
    model = Generator.from_pretrained(tmp_path / "one")
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16)):
        changed.save_pretrained(tmp_path / "two")
        assert provenance(tmp_path / "two") == known
    model = Generator.from_pretrained(tmp_path / "one")
    torch.nn.init.ones_(model.output.bias)
    model.save_pretrained(tmp_path / "two")
    assert provenance(tmp_path / "two") == {
        "classes": ["a", "b"], "tokenizer": "abc", "based_on": {"data": "photos", "step": 7},
    }  # fmt: skip
    model.save_pretrained(tmp_path / "two", {"data": "mine"})
    assert provenance(tmp_path / "two") == {"data": "mine"}
    tiny_generator().save_pretrained(tmp_path / "three")
    assert provenance(tmp_path / "three") == {}


def test_a_rounded_tokenizer_remains_the_one_that_generators_know(tmp_path: Path, tiny_tokenizer) -> None:
    original = tiny_tokenizer()
    fingerprint = encoder_fingerprint(original.state_dict())
    save_model(tmp_path / "rounded", copy.deepcopy(original).half(), {"fingerprint": fingerprint})
    model = Tokenizer.from_pretrained(tmp_path / "rounded")
    model.save_pretrained(tmp_path / "again")
    assert provenance(tmp_path / "again") == {"fingerprint": fingerprint}
    with torch.no_grad():
        model.encoder.conv_out.bias.add_(1)
    model.save_pretrained(tmp_path / "again")
    assert "fingerprint" not in provenance(tmp_path / "again")


def test_files_of_others_and_cards_are_kept(tmp_path: Path, tiny_tokenizer) -> None:
    model, folder = tiny_tokenizer(), tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine" and (folder / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="card: expected a folder without README.md, got .*model; force=True"):
        model.save_pretrained(folder, license="mit")
    model.save_pretrained(folder, force=True, license="mit")
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.license == "mit"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="target: expected a new name, or a model that alitok_fast wrote"):
        model.save_pretrained(tmp_path / "other")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["config.json"]


def test_a_model_that_is_not_its_configuration_is_not_saved(tmp_path: Path, tiny_generator) -> None:
    model = tiny_generator()
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="tensors do not fit .*adapter"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- cards ----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(tmp_path: Path, tiny_tokenizer) -> None:
    known = {"data": "pho|tos\x1b", "training": {"steps": 5, "betas": [0.9, 0.9]}, "images": 12, "nothing": None}
    fields = {"license": "apache-2.0", "metrics": {"rFID": 0.86, "PSNR": 23}, "evaluated_on": "ImageNet val"}
    more = {"datasets": ["user/data"], "tags": ["mine"], "description": "Of *mine*.", "title": "My tokenizer"}
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path / "m", known, **fields, **more)
    text = (tmp_path / "m" / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "alitok_fast", ["user/data"])
    assert data.tags == ["alitok", "image-tokenizer", "mine"] and data.pipeline_tag == "image-to-image"
    assert [(r.metric_name, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        ("rFID", 0.86, "ImageNet val"), ("PSNR", 23, "ImageNet val"),
    ]  # fmt: skip
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    for line in (
        "# My tokenizer",
        "pictures of 16 x 16 pixels to 21 tokens out of 32 codes",
        "Of *mine*.",
        f"| parameters | {count:,} |",
        "| `codebook_size` | 32 |",
        'Tokenizer.from_pretrained("m")',
        "| data | pho\\|tos\\x1b |",
        "| training: `steps` | 5 |",
        "| rFID | 0.86 |",
    ):
        assert line in text
    assert "nothing" not in text and "{{" not in text and "None" not in text


def test_the_example_of_a_card_runs(tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    code = (tmp_path / "m" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (2, 3, 16, 16)


def test_a_card_without_facts_claims_none(tmp_path: Path, tiny_generator) -> None:
    tiny_generator().save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    assert "Nothing is recorded." in text and "Not stated." in text and "## Results" not in text
    data = huggingface_hub.ModelCard(text).data
    assert data.license is None and data.eval_results is None and data.datasets is None


def test_long_lists_of_classes_are_cut(tmp_path: Path, tiny_generator) -> None:
    names = [f"class {i}" for i in range(40)]
    tiny_generator(num_classes=40).save_pretrained(tmp_path / "m", {"classes": names})
    text = (tmp_path / "m" / "README.md").read_text()
    assert "class 19, ... (40) |" in text and "class 20" not in text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"license": 5}, TypeError, "license: expected text, got 5"),
        ({"tags": "mine"}, TypeError, "tags: expected a list of texts, got 'mine'"),
        ({"metrics": {"FID": "low"}}, ValueError, "metrics: expected a finite number for 'FID', got 'low'"),
        ({"metrics": {"FID": float("nan")}}, ValueError, "metrics: expected a finite number for 'FID', got nan"),
        ({"metrics": {"FID": 1.0}}, ValueError, "evaluated_on: expected the data that metrics were measured on"),
        ({"licence": "mit"}, TypeError, "licence"),
    ],
)
def test_fields_are_checked_before_anything_is_written(tmp_path, tiny_generator, hub, fields, error, message) -> None:
    model = tiny_generator()
    for act in (lambda: model.save_pretrained(tmp_path / "m", **fields), lambda: model.push_to_hub("me/m", **fields)):
        with pytest.raises(error, match=message):
            act()
    assert not (tmp_path / "m").exists() and hub.calls == []
    assert CardFields() == CardFields()


# --- the hub --------------------------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back(hub: Hub, tiny_generator) -> None:
    model = tiny_generator()
    assert model.push_to_hub("me/model", provenance={"classes": ["a"]}, license="mit", token="t") == "hub/commit"
    assert ("create_repo", "me/model", None, True) in hub.calls and ("token", "t") in hub.calls
    found = Generator.from_pretrained("me/model", revision="v1", token=False)
    assert same(found, model) and found.loaded.provenance == {"classes": ["a"]}
    assert hub.calls[-1] == ("snapshot_download", {"revision": "v1", "token": False})
    text = (hub.root / "me/model/README.md").read_text()
    assert 'Pipeline.from_pretrained("me/model"' in text and "license: mit" in text


def test_two_folders_are_a_pipeline(hub: Hub, tiny_tokenizer, tiny_generator) -> None:
    tiny_tokenizer().push_to_hub("me/both", "tokenizer")
    tiny_generator().push_to_hub("me/both", "generator", private=True, revision="dev", commit_message="second")
    assert ("create_repo", "me/both", True, True) in hub.calls and (
        "create_branch",
        "me/both",
        "dev",
        True,
    ) in hub.calls
    assert hub.calls[-1] == ("upload_folder", "second", "dev", False)
    assert Pipeline.from_pretrained("me/both")([1]).pixels.shape == (1, 16, 16, 3)
    assert tiny_tokenizer().push_to_hub("me/both", "tokenizer", revision="x", create_pr=True) == "hub/pr"
    assert ("create_branch", "me/both", "x", True) not in hub.calls


def test_a_card_on_the_hub_stays(hub: Hub, tiny_generator) -> None:
    (hub.root / "me/model").mkdir(parents=True)
    (hub.root / "me/model/README.md").write_text("mine")
    tiny_generator().push_to_hub("me/model")
    assert (hub.root / "me/model/README.md").read_text() == "mine"
    assert (hub.root / "me/model/model.safetensors").is_file()
    with pytest.raises(ValueError, match="card: expected a repository without README.md, got me/model; force=True"):
        tiny_generator().push_to_hub("me/model", license="mit")
    tiny_generator().push_to_hub("me/model", force=True)
    assert (hub.root / "me/model/README.md").read_text().startswith("---")


def test_missing_huggingface_hub_is_explained(tmp_path: Path, tiny_generator, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = tiny_generator()
    with pytest.raises(ImportError, match=r"a model card needs huggingface_hub: pip install .*\[hub\]'"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(ImportError, match=r"uploading to the hub needs huggingface_hub: pip install .*\[hub\]'"):
        model.push_to_hub("me/m")
    assert not (tmp_path / "m").exists()
    save_model(tmp_path / "m", model)
    assert same(Generator.from_pretrained(tmp_path / "m"), model)


def test_models_do_not_import_the_hub() -> None:
    code = "import sys; from alitok_fast import Tokenizer; Tokenizer.from_pretrained('demo'); "
    code += "print([name for name in ('huggingface_hub', 'jinja2') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "huggingface_hub" not in said
