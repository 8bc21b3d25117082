"""Import a host library (Avalanche, Stable-Baselines3, ...) only when it is used, with a helpful error."""

import importlib
import warnings
from types import ModuleType

from modmoe.errors import MissingExtraError

_LEARN2LEARN = "run `make setup` in a clone of modmoe (its sdist does not build on Python 3.11 by itself)"
_INSTALL = {
    "avalanche": "pip install 'modmoe[continual]'",
    "sklearn": "pip install 'modmoe[continual]'",
    "stable_baselines3": "pip install 'modmoe[rl]'",
    "gymnasium": "pip install 'modmoe[rl]'",
    "torchvision": "pip install 'modmoe[vision]'",
    "timm": "pip install timm",
    "matplotlib": "pip install 'modmoe[report]'",
    "pandas": "pip install 'modmoe[report]'",
    "learn2learn": _LEARN2LEARN,
}


def import_host(name: str) -> ModuleType:
    """Import ``name`` (dots allowed) or say how to install it.

    Args:
        name: a module of a host library, for instance ``"avalanche.training"``.
    Returns:
        The imported module.
    Raises:
        MissingExtraError: if the host library is not installed; the message holds the install command.
    """
    top = name.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a host's import-time notices are nothing its user here can mend
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module missing inside the host is the host's fault and keeps its own traceback.
        if error.name != top:
            raise
        hint = _INSTALL.get(top, f"pip install {top}")
        raise MissingExtraError(f"'{top}' is needed for this and is not installed. Install it with: {hint}") from error
