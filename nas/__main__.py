"""Entry point of the `nas` command: turns errors that a user can cause into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

STOPPED = 130  # what a shell gives a command stopped by Ctrl-C


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    import typer

    from blocks.errors import NasError
    from nas.cli import app

    try:
        code = app(prog_name="nas", standalone_mode=False)  # an exit code for --help and, in new versions, for Ctrl-C
    except NasError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(
            f"{where}{error.strerror or error}; free space or fix access, then run the same command again",
            1,
        )
    except Exception as error:
        # A usage error. Typer carries its own click, so that its class has no name to import.
        if not hasattr(error, "format_message"):
            raise
        ctx = getattr(error, "ctx", None)
        hint = f"; see {ctx.command_path} --help" if ctx is not None else ""
        message = error.format_message().strip().rstrip(".")
        fail(message and message + hint, getattr(error, "exit_code", 2))
    if code == STOPPED:
        print("stopped; run the same command again and it goes on from here", file=sys.stderr)
    sys.exit(code or 0)


def fail(message: str, code: int) -> NoReturn:
    """Ends with one line, whatever line breaks the message of a library brought along."""
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
