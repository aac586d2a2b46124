"""Options that commands share, made of dataclass fields: name, default and help of each are written once."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from alitok_fast.pipelines.load_options import DeviceOptions, LoadOptions, option

__all__ = ["DeviceOptions", "LoadOptions", "option"]  # what is re-exported

# typer reads annotations at run time, and on Python 3.10 it needs them in this form.
MaybeText = Optional[str]  # noqa: UP045
MaybeTexts = Optional[list[str]]  # noqa: UP045
MaybeInt = Optional[int]  # noqa: UP045
MaybePath = Optional[Path]  # noqa: UP045
BatchSize = Annotated[int, typer.Option(help="Images computed together.", min=1)]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that no command here has written.")]
Progress = Annotated[bool, typer.Option(help="Show a progress bar, or lines where there is no terminal.")]


def with_options(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: the parameters named in `groups` come from options, one per field of their dataclass.

    A field's metadata gives its "help"; its default is the option's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name in groups:
                parameters += _parameters(groups[parameter.name])
            else:
                keyword = inspect.Parameter.KEYWORD_ONLY  # as typer calls, in any order
                parameters.append(parameter.replace(annotation=hints[parameter.name], kind=keyword))

        def run(**given: Any) -> None:
            made = {
                name: group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
                for name, group in groups.items()
            }
            command(**given, **made)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have no such attribute
        return run

    return decorate


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=Annotated[
                _optional(hints[f.name]), typer.Option(*f.metadata.get("names", ()), help=f.metadata["help"])
            ],
        )
        for f in dataclasses.fields(group)
    ]


def _optional(hint: Any) -> Any:
    """`X | None` in the form that typer reads on every Python."""
    if isinstance(hint, types.UnionType):
        return Optional[next(part for part in typing.get_args(hint) if part is not type(None))]  # noqa: UP045
    return hint


def check_picture(path: Path, force: bool, inputs: Sequence[Path] = (), size: tuple[int, int] | None = None) -> None:
    """That a picture can be written at `path`: a format for `size`, none of the `inputs`, no file of somebody else's.

    A picture with our metadata beside it (`x.png.json`) was written here. Raises ValueError.
    """
    from alitok_fast.storage.images import check_image_name

    check_image_name(path, size)
    for file in inputs:
        if path.exists() and file.exists() and path.samefile(file):
            raise ValueError(f"out: expected another file than the input, got {path}")
    if not force:
        for file in (path, beside(path)):
            if file.exists() and not _ours(beside(path)):
                raise ValueError(f"out: {file} is there, and no command here has written it; choose another or --force")


def beside(picture: Path) -> Path:
    """The metadata of a picture, under its whole name: x.json might be a file of the user's."""
    return picture.with_name(picture.name + ".json")


def _ours(metadata: Path) -> bool:
    from alitok_fast.storage.files import read_json

    try:
        return "alitok_fast" in read_json(metadata).get("versions", {})
    except (OSError, ValueError, TypeError):
        return False


def write_metadata(picture: Path, metadata: dict[str, Any]) -> None:
    """Write `metadata` beside `picture`, and say so."""
    from alitok_fast.storage.files import write_json

    write_json(beside(picture), metadata)
    typer.echo(f"wrote {picture} and {beside(picture)}")
