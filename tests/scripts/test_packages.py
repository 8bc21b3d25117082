"""scripts/fetching/packages.py: which commands it runs, and what it says when they fail."""

import sys

import pytest


def test_packages_are_asked_for_by_name(script, tmp_path, monkeypatch):
    asked = []

    def run(command, folder):
        assert folder == tmp_path
        asked.append(command)
        (folder / left).write_bytes(b"")

    monkeypatch.setattr(script.packages, "run", run)
    for get, left in (("npm_package", "a-1.tgz"), ("pip_wheel", "a-1.whl"), ("pip_source", "a-1.tar.gz")):
        assert getattr(script.packages, get)("a==1", tmp_path) == tmp_path / left
    quiet = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    assert asked == [
        ["npm", "pack", "--loglevel=error", "--ignore-scripts", "a==1"],
        [*quiet, "--only-binary=:all:", "--dest", ".", "a==1"],
        [*quiet, "--no-binary=:all:", "--no-build-isolation", "--dest", ".", "a==1"],
    ]


@pytest.mark.parametrize("names", [[], ["a.whl", "b.whl"]])
def test_a_package_manager_leaves_one_file(script, tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(script.packages.NotGotError, match=rf"left {len(names)} files \*\.whl instead of one"):
        script.packages.only(tmp_path, "*.whl")


def test_commands_that_fail_or_are_not_installed(script, tmp_path):
    with pytest.raises(script.packages.NotGotError, match="no-such-command is not installed"):
        script.packages.run(["no-such-command"], tmp_path)
    with pytest.raises(script.packages.NotGotError, match="failed: because"):
        script.packages.run(
            [sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"], tmp_path
        )
    script.packages.run([sys.executable, "-c", "open('made', 'w')"], tmp_path)
    assert (tmp_path / "made").exists()
