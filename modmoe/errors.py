"""The errors that modmoe raises beyond Python's own, and the suggestion that their messages end with."""

import difflib
from collections.abc import Iterable


class NonFiniteError(ValueError):
    """An input or a router's score holds NaN or infinity."""


class TableError(ValueError):
    """A file is no table of measured times."""


class MissingExtraError(ImportError):
    """A host library is not installed; the message holds the command that installs it."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is most like a mistyped one.

    Args:
        word: what was written.
        known: what could have been meant.
    Returns:
        ``"; did you mean 'x'?"``, or an empty string if nothing is close.
    """
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
