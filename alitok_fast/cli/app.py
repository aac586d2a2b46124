"""`alitok-fast`: the commands together, and how their errors end. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from alitok_fast import __version__
from alitok_fast.cli import data, evaluate, photographs, sampling, serve, study, tokens, train
from alitok_fast.cli.options import MaybeText
from alitok_fast.storage.text import shown

INTERRUPTED = 130  # exit status after Ctrl-C; typer returns it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="AliTok: photographs to tokens and back, class labels to pictures.",
    epilog="Every command shows examples: alitok-fast COMMAND --help",
)
_commands: dict[str, Any] = {
    "sample": sampling.sample,
    "complete": sampling.complete,
    "watch": sampling.watch,
    "serve": serve.serve,
    "reconstruct": photographs.reconstruct,
    "tokenize": train.tokenize_command,
    "convert": photographs.convert,
}
for _name, _command in _commands.items():
    app.command(_name)(_command)
app.add_typer(train.app, name="train")
app.add_typer(study.app, name="study")
app.add_typer(tokens.app, name="tokens")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alitok-fast {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def info(
    classes: Annotated[bool, typer.Option("--classes", help="List the classes of --model instead.")] = False,
    model: Annotated[str, typer.Option(help="'demo', 'imagenet', a folder, a hub repository or a generator.")] = "demo",
    probe: Annotated[
        MaybeText,
        typer.Option(help="Measure instead what windows are worth with this generator: the same images, in turns."),
    ] = None,
    weight_dtype: Annotated[MaybeText, typer.Option(help="Of --probe, as for sample.")] = None,
    activation_dtype: Annotated[MaybeText, typer.Option(help="Of --probe, as for sample.")] = None,
    device: Annotated[str, typer.Option(help="Of --probe: cpu, cuda or cuda:N.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Of --probe: images sampled together.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Of --probe: how long, about.", min=0.001)] = 60.0,
) -> None:
    """Print versions, what was built, what this machine can use, and why something is off.

    \b
    Examples:
      alitok-fast info
      alitok-fast info --classes --model imagenet
      alitok-fast info --probe demo --weight-dtype int8 --seconds 10
    """
    if probe is not None:
        from alitok_fast.device import check_device
        from alitok_fast.inference.probe import probe as measure
        from alitok_fast.inference.probe import probe_table
        from alitok_fast.inference.step_model import prepare
        from alitok_fast.models import load_generator
        from alitok_fast.models.loading import dtype_from_name

        weights = dtype_from_name(weight_dtype, "weight_dtype")
        prepared = prepare(
            load_generator(probe, check_device(device)), weights, dtype_from_name(activation_dtype, "activation_dtype")
        )
        typer.echo(probe_table(measure(prepared, batch_size=batch_size, seconds=seconds), batch_size))
        return
    if classes:
        from alitok_fast.pipelines.class_names import class_names_of

        for number, name in enumerate(class_names_of(model)):
            typer.echo(f"{number:4} {shown(name)}")
        return
    from alitok_fast.info import report

    typer.echo(report())


def main() -> None:
    """Entry point. What the user can mend is one line and exit status 2; ALITOK_TRACEBACK=1 shows where it arose."""
    try:
        status = app(prog_name="alitok-fast", standalone_mode=False)
        if status == INTERRUPTED:
            _complain("interrupted", status)
    except (typer.Abort, KeyboardInterrupt):
        status = _complain("interrupted", INTERRUPTED)
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("ALITOK_TRACEBACK"):
            raise
        computing = isinstance(error, RuntimeError | FloatingPointError | MemoryError)
        status = _complain(str(error) or "out of memory", 1 if computing else 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # neither the library's nor the parser's complaint: a bug
            raise
        status = _complain(f"{error.format_message()} (alitok-fast --help)", 2)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    typer.echo(f"alitok-fast: {shown(' '.join(message.split()), limit=100_000)}", err=True)
    return status
