"""Options that commands share, made of dataclass fields: name, default and help of each are written once."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from alitok_fast.models import Tokenizer
    from alitok_fast.pipelines.pipeline import Pipeline

# typer reads annotations at run time, and on Python 3.10 it needs them in this form.
MaybeText = Optional[str]  # noqa: UP045
MaybeTexts = Optional[list[str]]  # noqa: UP045
MaybeInt = Optional[int]  # noqa: UP045
MaybePath = Optional[Path]  # noqa: UP045
BatchSize = Annotated[int, typer.Option(help="Images computed together.", min=1)]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that no command here has written.")]
Progress = Annotated[bool, typer.Option(help="Show a progress bar, or lines where there is no terminal.")]


def option(default: Any, help: str, *names: str) -> Any:
    """A field that is an option of a command, called as the field is unless `names` are given."""
    return field(default=default, metadata={"help": help, "names": names})


@dataclass(frozen=True)
class DeviceOptions:
    """Where a model runs, and in which precision."""

    device: str = option("cpu", "Device: cpu, cuda or cuda:N.")
    dtype: str = option("float32", "Precision of the models: float32, bfloat16 or float16.")
    weights: str = option("ema", "Of a checkpoint with averaged (EMA) weights, take 'ema' or 'raw'.")

    def load_tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer called `name`; raises as `alitok_fast.load_tokenizer`."""
        from alitok_fast.device import check_device
        from alitok_fast.models import load_tokenizer
        from alitok_fast.models.loading import dtype_from_name

        dtype: Any = dtype_from_name(self.dtype)
        return load_tokenizer(name, check_device(self.device), dtype, weights=self.weights)


@dataclass(frozen=True)
class LoadOptions(DeviceOptions):
    """What a pipeline is loaded from, and what its weights are rounded to."""

    model: str = option("demo", "'demo', a folder, a hub repository, or a generator's checkpoint.")
    tokenizer: str | None = option(None, "The tokenizer, where --model is a generator alone.")
    weight_dtype: str | None = option(
        None,
        "Precision of the generator's matrices: float32, bfloat16 or int8 on a CPU; int8 or float8_e4m3fn on a GPU.",
    )
    activation_dtype: str | None = option(
        None,
        "int8 multiplies int8 matrices on a CPU with 8-bit activations: faster for many images, and less exact.",
    )
    decode_dtype: str | None = option(
        None,
        "Precision of the step from tokens to pixels: float32, bfloat16 or float16, on a CPU also int8. "
        "If not given, bfloat16 where that is faster.",
    )

    def pipeline(self) -> Pipeline:
        """The pipeline; raises as `Pipeline.from_pretrained`."""
        from alitok_fast.device import check_device, local_device
        from alitok_fast.models.loading import dtype_from_name
        from alitok_fast.pipelines.pipeline import Pipeline

        dtype: Any = dtype_from_name(self.dtype)
        return Pipeline.from_pretrained(
            self.model,
            local_device(check_device(self.device)),
            dtype,
            self.tokenizer,
            dtype_from_name(self.weight_dtype, "weight_dtype"),
            dtype_from_name(self.decode_dtype, "decode_dtype"),
            weights=self.weights,
            activation_dtype=dtype_from_name(self.activation_dtype, "activation_dtype"),
        )


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
