"""What the command lines of these programs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from studies.tasks.task import MissingDataError

INTERRUPTED = 130  # exit status of a program that Ctrl-C ended


def exit_status(program: str, do: Callable[[], object], *, goes_on: str = "") -> int:
    """Do what a command line says, and return the exit status: 2, with a line of why, for what cannot be done.

    Args:
        goes_on: where an interrupted command goes on, if it is called again.
    """
    try:
        do()
    except KeyboardInterrupt:
        print(f"Stopped{f'; the same command goes on {goes_on}' if goes_on else ''}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, MissingDataError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    """A type of argparse: an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)
