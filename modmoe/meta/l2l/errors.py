"""What can be wrong with an adaptation."""


class AdaptationError(ValueError):
    """A step of adaptation would fail, or silently do nothing; the message names the parameters and a way out."""


class StaleWrapperError(RuntimeError):
    """The wrapped module has grown, frozen or removed experts since its wrapper last looked at it."""
