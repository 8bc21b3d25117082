"""import_host: a missing host library says how it is installed; a broken one keeps its own error."""

import sys

import pytest

from modmoe import MissingExtraError
from modmoe.hosts import import_host


@pytest.fixture
def without(monkeypatch):
    """Makes modules impossible to import."""

    class Missing:
        def __init__(self):
            self.names: set[str] = set()

        def find_spec(self, name, path=None, target=None):
            if name in self.names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    finder = Missing()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])

    def hide(name: str) -> None:
        finder.names = {*finder.names, name}
        for loaded in [n for n in sys.modules if n == name or n.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, loaded)

    return hide


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A host of our own, importable as ``a_host``."""
    folder = tmp_path / "a_host"
    folder.mkdir()
    (folder / "__init__.py").write_text("answer = 42\n")
    (folder / "broken.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "a_host"]:
        del sys.modules[name]


def test_it_imports():
    assert import_host("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("avalanche", r"pip install 'modmoe\[continual\]'"),
        ("avalanche.training.plugins", r"pip install 'modmoe\[continual\]'"),
        ("sklearn.datasets", r"pip install 'modmoe\[continual\]'"),
        ("stable_baselines3", r"pip install 'modmoe\[rl\]'"),
        ("gymnasium.spaces", r"pip install 'modmoe\[rl\]'"),
        ("torchvision", r"pip install 'modmoe\[vision\]'"),
        ("matplotlib.pyplot", r"pip install 'modmoe\[report\]'"),
        ("learn2learn", "make setup"),
        ("a_library_nobody_has", "pip install a_library_nobody_has"),
    ],
)
def test_a_missing_host_says_how_to_install_it(name, command, without):
    top = name.partition(".")[0]
    without(top)
    with pytest.raises(MissingExtraError, match=f"'{top}' is needed for this and is not installed.*{command}") as error:
        import_host(name)
    assert isinstance(error.value, ImportError)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_a_module_missing_inside_a_host_keeps_its_own_error(package):
    assert import_host("a_host").answer == 42
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        import_host("a_host.broken")


def test_a_host_without_that_module_is_not_called_missing(package):
    with pytest.raises(ModuleNotFoundError, match=r"a_host\.newer") as error:
        import_host("a_host.newer")
    assert not isinstance(error.value, MissingExtraError)
