"""The commands: wiring only. Nothing heavy is imported before a command needs it, so that help is instant."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from lightning_tdisent import __version__
from lightning_tdisent.cli import data, fleets, models
from lightning_tdisent.cli.terminal import IMPORTED, import_modules
from lightning_tdisent.cli.trainings import describe, fits
from lightning_tdisent.errors import NAMED, Crashed, InputError, nearest
from lightning_tdisent.files import expand_word

__all__ = ["describe", "fits", "main", "parser"]

LIGHTNING = {
    "fit": "train one module: --config FILE [--config OVERLAY ..] [--run FOLDER] [--import MODULE]",
    "validate": "held-out errors, quality and pictures of a checkpoint or composite",
    "test": "the same, logged as test",
    "predict": "write images of seeds with a LightningModule",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line but for the options of Lightning's four commands."""
    out = argparse.ArgumentParser(
        "python -m lightning_tdisent", description="Diffusion models over few latent states, and their composition."
    )
    out.add_argument("--version", action="version", version=__version__)
    commands = out.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    for part in (models, fleets, data):
        part.add_commands(commands)
    out.set_defaults(commands=commands.choices)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its status: 0 done, 1 halted and 2 refused (one message, no traceback), 130 interrupted,
    143 preempted; 70 for an error that nobody foresaw, with its traceback, 75 for one of a disk or a network.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv = [expand_word(word, braces=argv[0] not in LIGHTNING) for word in argv]
        if argv and argv[0] in LIGHTNING:
            from lightning_tdisent.lit.entry import run

            options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            options.add_argument("--import", dest="imports", action="append", default=[])
            found, argv = options.parse_known_args(argv)
            import_modules(found.imports)
            run(argv)
            return 0
        if argv and not argv[0].startswith("-"):
            known = list(parser().get_default("commands"))
            if argv[0] not in known:
                raise InputError(
                    f"there is no command {argv[0]!r}.{nearest(argv[0], known)} Commands: {', '.join(known)}"
                )
        arguments = parser().parse_args(argv)
        import_modules(arguments.imports)
        arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NAMED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 75
    except Exception:
        traceback.print_exc()
        return Crashed.code
    finally:
        os.environ.pop(IMPORTED, None)
    return 0
