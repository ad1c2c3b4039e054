"""Entry point of the `nas` command: turns errors that a user can cause into one line and an exit code."""

from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    from blocks.errors import NasError
    from nas.cli import app

    try:
        app()
    except NasError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; run the same command again and it goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}{error.strerror or error}; free space or fix access, then run the same command again",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
