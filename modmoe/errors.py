"""The errors that modmoe raises beyond Python's own."""


class NonFiniteError(ValueError):
    """An input, a logit or an expert's output holds NaN or infinity."""


class MissingExtraError(ImportError):
    """A host library is not installed; the message holds the command that installs it."""
