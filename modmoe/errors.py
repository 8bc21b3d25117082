"""The errors that modmoe raises beyond Python's own."""


class NonFiniteError(ValueError):
    """An input or a router's score holds NaN or infinity."""


class TableError(ValueError):
    """A file is no table of measured times."""


class MissingExtraError(ImportError):
    """A host library is not installed; the message holds the command that installs it."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file."""
