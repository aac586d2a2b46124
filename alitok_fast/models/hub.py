"""Loading, saving and publishing, as methods of the models: the interface of huggingface_hub's PyTorchModelHubMixin.

The mixin itself is not a base class: it would make huggingface_hub a requirement of importing a model, and its
`config.json` holds the arguments of a constructor, where that of our folders says kind, version and provenance too.
So these methods read and write our folders, and leave downloads, uploads and cards to functions of that library.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.storage import checkpoint
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.storage.files import write_atomically
from alitok_fast.storage.hub import CARD_NAME, open_checkpoint, push_folder, require_hub
from alitok_fast.storage.model_card import CardFields, model_card
from alitok_fast.storage.state_dict import plain_names
from alitok_fast.storage.text import shown

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONAL_KEYS = {"quantize.embed_prob"}  # training statistics: absent from released stage-2 files
_SAMPLE = 64  # values of each tensor
_KEPT = ("classes", "tokenizer")  # of a provenance, when the weights have been trained further

Model = TypeVar("Model", bound="HubModel")


@dataclass(frozen=True)
class Loaded:
    """What a model was loaded from: its provenance, and some values of each tensor, to know the weights again."""

    provenance: dict[str, Any]
    values: dict[str, Tensor]

    def holds(self, state: dict[str, Tensor]) -> bool:
        """Whether these weights are the loaded ones, in any precision."""
        now = {name: _some(state[name]) for name in self.values if name in state}
        return now.keys() == self.values.keys() and all(
            torch.equal(self.values[name].to(value.dtype), value) for name, value in now.items()
        )


class HubModel(nn.Module):
    """Base of Tokenizer and Generator: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

    kind: ClassVar[str]
    config: Any
    loaded: Loaded | None = None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_name: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: TokenizerConfig | GeneratorConfig | None = None,
        weights: str = "ema",
        **download: Any,
    ) -> Model:
        """A model in evaluation mode, from a folder, a file or a repository on the hub.

        Arguments and errors as for `load_tokenizer`. `download` are those of `huggingface_hub.snapshot_download`:
        `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.
        """
        check_model_dtype(dtype)
        # The checkpoint is gone before weights are converted: no more than one copy in the file's precision.
        model = cls.from_checkpoint(open_checkpoint(cls.kind, path_or_name, config, weights, **download))
        return model.to(device, dtype).eval()

    @classmethod
    def from_checkpoint(cls: type[Model], source: Checkpoint) -> Model:
        """The module that holds a checkpoint's weights. Raises ValueError, naming its file, where they do not fit."""
        model = fitted(cls, source.config, source.state, source.path)
        expected = model.state_dict()
        state = {name: source.state[name] for name in expected if name in source.state}
        model.loaded = Loaded(source.provenance, {name: _some(tensor) for name, tensor in state.items()})
        for name in set(expected) - set(state):
            state[name] = torch.zeros(expected[name].shape, dtype=torch.float32, device="cpu")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(
        self, folder: str | os.PathLike, provenance: dict[str, Any] | None = None, force: bool = False, **card: Any
    ) -> Path:
        """Write config.json, model.safetensors and a model card README.md, and return the folder.

        Args:
            provenance: None keeps that of the file which the model was loaded from; where its weights have changed
                since, under "based_on".
            force: also write over a card that is there, and over files that are no model of ours. Otherwise a card
                stays.
            card: fields of the card: `license`, `metrics` and `evaluated_on`, `datasets`, `tags`, `description`,
                `title`; see `alitok_fast.storage.model_card.CardFields`.

        Raises as `save_model` does; ImportError without huggingface_hub, which makes the card (`save_model` writes the
        folder without one).
        """
        return self._save(Path(folder), provenance, force, CardFields(**card), bool(card), Path(folder).resolve().name)

    def push_to_hub(
        self,
        repository: str,
        path_in_repo: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
        provenance: dict[str, Any] | None = None,
        force: bool = False,
        **card: Any,
    ) -> str:
        """Upload the files of `save_pretrained` to a repository ("user/name"), made if need be; the commit's address.

        `path_in_repo`: a folder in it. A repository with folders "tokenizer" and "generator" is one that
        `Pipeline.from_pretrained` loads. A card that the repository holds stays; ValueError where fields of another are
        given, unless `force`. `private`, `revision`, `create_pr`, `commit_message` and `token` as for
        `huggingface_hub.HfApi`.
        """
        fields = CardFields(**card)
        require_hub("uploading to the hub")
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), provenance, False, fields, bool(card), repository)
            kept = "replace" if force else "refuse" if card else "keep"
            return push_folder(
                Path(folder), repository, path_in_repo, kept, private, revision, create_pr, commit_message, token
            )

    def _save(
        self, folder: Path, provenance: dict[str, Any] | None, force: bool, fields: CardFields, asked: bool, where: str
    ) -> Path:
        state = plain_names(self.state_dict(), "model")
        fitted(type(self), self.config, state, "model")
        source = Checkpoint(self.config, state, self._provenance(state) if provenance is None else provenance)
        text = model_card(source, fields, where)
        path = folder / CARD_NAME
        if path.exists() and not force:
            if asked:
                raise ValueError(
                    f"card: expected a folder without {CARD_NAME}, got {folder}; force=True writes over it"
                )
            text = ""
        checkpoint.write_checkpoint(folder, source, force)
        if text:
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return folder

    def _provenance(self, state: dict[str, Tensor]) -> dict[str, Any]:
        if self.loaded is None:
            return {}
        before = self.loaded.provenance
        if self.loaded.holds(state):
            return before
        kept = {name: value for name, value in before.items() if name in _KEPT}
        rest = {name: value for name, value in before.items() if name not in _KEPT}
        return kept | ({"based_on": rest} if rest else {})


def check_model_dtype(dtype: torch.dtype) -> None:
    """ValueError for a dtype that no model computes in."""
    if dtype not in MODEL_DTYPES.values():
        expected = "float32, bfloat16 or float16"
        raise ValueError(f"dtype: expected {expected}, got {str(dtype).removeprefix('torch.')}")


def fitted(
    model_class: type[Model], config: TokenizerConfig | GeneratorConfig, state: dict[str, Tensor], path: str
) -> Model:
    """The module of `config`, without memory, once all tensors of `state` fit it."""
    checkpoint.check_sizes(config, state, path, "config")
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    wrong = [
        f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = sorted(set(expected) - set(state) - _OPTIONAL_KEYS)
    unexpected = sorted(set(state) - set(expected) - _OPTIONAL_KEYS)
    wrong += [f"{name}: expected, missing" for name in missing]
    wrong += [f"{shown(name)}: unexpected" for name in unexpected]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit {config}; the first: {wrong[0]}")
    return model


def _some(tensor: Tensor) -> Tensor:
    """Some of its values, in a copy on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].cpu().clone()
