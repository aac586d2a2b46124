"""Models by name: shipped with the package, in a folder, in a file, or in a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from alitok_fast._library import install_hint
from alitok_fast.config import GENERATORS, TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.storage.checkpoint import CONFIG_NAME, WEIGHTS_NAME, Checkpoint, read_checkpoint

CARD_NAME = "README.md"
SHIPPED = ("demo", "photos-64")  # the latter has a tokenizer alone
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def resolve(path_or_name: str | os.PathLike, kind: str, **download: Any) -> Path:
    """The local path of a model, fetched from the hub where it is a repository id.

    `kind` is the folder that holds it in a pipeline's: "tokenizer", "generator", or "stage1" for a causal tokenizer.
    `download` are arguments of `huggingface_hub.snapshot_download`, of those in DOWNLOAD_OPTIONS.
    """
    if unknown := sorted(set(download) - set(DOWNLOAD_OPTIONS)):
        raise TypeError(f"{unknown[0]}: expected an argument out of {', '.join(DOWNLOAD_OPTIONS)}, got an unknown one")
    name = str(path_or_name)
    if name in SHIPPED:  # a folder of that name is "./demo"
        shipped = Path(str(resources.files("alitok_fast") / "weights" / name / kind))
        if not shipped.is_dir():
            raise FileNotFoundError(f"path_or_name: expected a model with a {kind}, got {name!r}, which has none")
        return shipped
    path = Path(path_or_name)
    if path.exists():
        part = path / kind
        return part if part.is_dir() else path
    presets = TOKENIZERS if kind == "tokenizer" else GENERATORS
    if name in presets:
        raise ValueError(
            f"path_or_name: expected weights, got the preset {name!r}, whose weights are not shipped; "
            "give the path of a released checkpoint file"
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.suffix:
        return resolve(_fetch(name, kind, download), kind)
    raise FileNotFoundError(
        "path_or_name: expected 'demo', 'photos-64', a checkpoint file or folder, or a hub repository id, "
        f"got {name!r}, which does not exist"
    )


def _fetch(repository: str, kind: str, download: dict[str, Any]) -> Path:
    hub = require_hub(f"{repository!r} is no local path, and fetching it from the hub")
    names = (CONFIG_NAME, WEIGHTS_NAME)
    patterns = [f"{prefix}{name}" for prefix in ("", f"{kind}/") for name in names]
    return Path(hub.snapshot_download(repository, allow_patterns=patterns, **download))


def require_hub(purpose: str) -> Any:
    """huggingface_hub; ImportError saying that `purpose` needs it, with the command that installs it."""
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f"{purpose} needs huggingface_hub: {install_hint('hub')}") from None
    return huggingface_hub


def open_checkpoint(
    kind: str,
    path_or_name: str | os.PathLike,
    config: TokenizerConfig | GeneratorConfig | None = None,
    weights: str = "ema",
    **download: Any,
) -> Checkpoint:
    """The checkpoint that `load_tokenizer` or `load_generator` builds, with its provenance."""
    source = read_checkpoint(resolve(path_or_name, kind, **download), config, weights)
    if source.kind != kind:
        raise ValueError(f"path_or_name: expected a {kind}, got a {source.kind} in {path_or_name}")
    return source


def push_folder(
    folder: Path,
    repository: str,
    path_in_repo: str | None = None,
    card: str = "keep",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a folder into a repository on the hub, which is made where there is none; the address of the commit.

    Of a model card that the repository holds, `card` says what becomes: it may "keep" it, "replace" it, or "refuse" to
    go on (ValueError).
    """
    api = require_hub("uploading to the hub").HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repository, branch=revision, exist_ok=True)
    name = f"{path_in_repo}/{CARD_NAME}" if path_in_repo else CARD_NAME
    kept = card != "replace" and api.file_exists(repository, name, revision=revision)
    if kept and card == "refuse":
        raise ValueError(f"card: expected a repository without {name}, got {repository}; force=True writes over it")
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        path_in_repo=path_in_repo,
        commit_message=commit_message or "Upload with alitok_fast",
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_NAME] if kept else None,
    )
    return str(commit.pr_url or commit.commit_url)
