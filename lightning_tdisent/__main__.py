"""Entry point of the command line: `python -m lightning_tdisent` and the console command `tdisent`."""

import os
import sys


def _in_utf8_mode() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding.

    Files and their names are UTF-8, but the libraries that read and write some of them use the encoding of the locale.
    The terminal keeps its encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606  the same command line


def command() -> None:
    """Run the command given on the command line and exit with its status."""
    _in_utf8_mode()
    from lightning_tdisent.cli import main

    code = main()
    if sys.argv[1:2] == ["evaluate"] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo's threads abort about one interpreter shutdown in ten; all output is written by then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
