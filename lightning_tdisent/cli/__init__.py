"""The commands: parse, call, print. A command imports heavy modules only when it needs them, to keep --help fast."""

import argparse
import contextlib
import io
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning_tdisent import __version__
from lightning_tdisent.cli import data, evaluations, fleets, models, project, quickstart, samples
from lightning_tdisent.cli.options import Parser, parse
from lightning_tdisent.cli.terminal import import_modules, keep_caches
from lightning_tdisent.cli.trainings import describe, fits
from lightning_tdisent.errors import NAMED, Crashed, InputError, nearest
from lightning_tdisent.files import expand_words, input_path, output_path
from lightning_tdisent.processes import IMPORTED

__all__ = ["describe", "fits", "main", "parser"]

LIGHTNING = {
    "fit": "train one module: --config FILE [--config OVERLAY ..] [--run FOLDER] [--import MODULE]",
    "validate": "compute held-out errors, quality and pictures of a checkpoint or composite",
    "test": "the same as validate, logged as test",
    "predict": "draw and write the images of seeds with a LightningModule",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, without the options of Lightning's four, which LightningCLI parses."""
    out = Parser(
        "python -m lightning_tdisent", description="Diffusion models over few latent states, and their composition."
    )
    out.add_argument("--version", action="version", version=__version__)
    commands = out.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    for part in (quickstart, samples, models, evaluations, fleets, data, project):
        part.add_commands(commands)
    out.set_defaults(commands=commands.choices)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done; 1: the training halted itself, 2: the request was refused (both with one message and no traceback);
    70: unexpected error, with its traceback; 75: disk or network error; 130: interrupted; 141: the reader of the output
    has exited (``| head``); 143: preempted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters missing in the terminal's encoding must not raise
            stream.reconfigure(errors="backslashreplace")
    try:
        argv = expand_words(argv, braces=argv[:1] == [] or argv[0] not in LIGHTNING)
        if invalid := [word for word in argv if any("\ud800" <= c <= "\udfff" for c in word)]:
            raise InputError(f"{invalid[0]!a}: is not UTF-8. Rename the file or folder")
        keep_caches()  # before importing libraries that look up their cache folder
        if argv and argv[0] in LIGHTNING:
            from lightning_tdisent.lit.entry import run

            options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            options.add_argument("--import", dest="imports", action="append", default=[])
            found, argv = options.parse_known_args(argv)
            import_modules(found.imports)
            run(argv)
            sys.stdout.flush()
            return 0
        if argv and not argv[0].startswith("-"):
            known = list(parser().get_default("commands"))
            if argv[0] not in known:
                raise InputError(
                    f"there is no command {argv[0]!r}.{nearest(argv[0], known)} Commands: {', '.join(known)}"
                )
        arguments = parse(parser(), argv)
        for name, value in vars(arguments).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):  # a local path; options that accept URLs have type str
                    (output_path if name in ("out", "html", "scratch") else input_path)(path, name)
        import_modules(arguments.imports)
        arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NAMED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns it into exit status 1
            return 141
        raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_exited():
            return 141
        if not (isinstance(error, TimeoutError) and str(error)):  # for an unreachable network the message suffices
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 75
    except Exception:
        traceback.print_exc()
        return Crashed.code
    finally:
        os.environ.pop(IMPORTED, None)
    return 0


def _reader_has_exited() -> bool:
    """Return whether the reader of our output has exited; if so, redirect the remaining output to the null device."""
    exited = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                exited = True
    return exited
