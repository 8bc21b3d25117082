"""Texts by genre: the Brown corpus, and a small one for tests."""

import codecs
import contextlib
import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modmoe.errors import DataNotFoundError
from modmoe.language.tokenizer import ByteTokenizer

BROWN_FILE = "brown/brown.json"
HELD_OUT = 6  # every sixth document of a genre
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Genre:
    """Documents of one kind as tokens.

    Args:
        train: documents (n,) uint8.
        validation: others.
    """

    train: list[Tensor]
    validation: list[Tensor]

    @property
    def text(self) -> Tensor:
        """(n,) uint8: the training documents, one after the other."""
        return torch.cat(self.train)

    def held_out(self, limit: int | None = None) -> list[Tensor]:
        """The validation documents, cut off after ``limit`` tokens in all."""
        kept: list[Tensor] = []
        for document in self.validation:
            room = len(document) if limit is None else limit - sum(map(len, kept))
            if room > 1:
                kept.append(document[:room])
        return kept


def load_brown(root: str | Path) -> dict[str, Genre]:
    """The Brown corpus: 500 texts of American English of 1961 in 15 genres, about 6 MB, as bytes.

    Words and punctuation stand apart, as the corpus has them, a sentence on a line. Of each genre every sixth document
    is for validation.

    Args:
        root: the folder that scripts/fetch_data.py has filled.
    Returns:
        genre -> documents, in the corpus's order.
    Raises:
        DataNotFoundError: if it is not there.
        ValueError: if the file is not what the script wrote.
    Source:
        Francis and Kucera 1964; redistribution permitted.
    """
    path = Path(root) / BROWN_FILE
    if not path.is_file():
        raise DataNotFoundError("brown", root, path)
    try:
        documents = [(entry["genre"], entry["text"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return split_genres(documents)


def split_genres(documents: list[tuple[str, str]]) -> dict[str, Genre]:
    """(genre, text) -> the documents of each genre, every sixth one for validation.

    Raises:
        ValueError: if a genre has too few documents for one of them to be held out.
    """
    tokenizer, found = ByteTokenizer(), {}
    for genre in dict.fromkeys(genre for genre, _ in documents):
        encoded = [tokenizer.encode(text) for name, text in documents if name == genre]
        if len(encoded) < HELD_OUT:
            raise ValueError(f"'{genre}' has {len(encoded)} documents, at least {HELD_OUT} are needed to hold one out")
        train = [text for number, text in enumerate(encoded) if number % HELD_OUT != HELD_OUT - 1]
        found[genre] = Genre(train, encoded[HELD_OUT - 1 :: HELD_OUT])
    return found


def zen_of_python() -> str:
    """The Zen of Python, which every Python carries: 857 bytes, in the public domain as PEP 20 says.

    That is little: enough to see that a model learns, not how well.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints it when it is first imported
        module = importlib.import_module("this")
    return codecs.decode(module.s, "rot13")


def zen_genres() -> dict[str, Genre]:
    """Five writings of the Zen of Python: as it is, lines backwards, a for z and so on, shifted by 5 and 13 letters.

    They use the same bytes in other orders or numbers. Its lines, two at a time, are the documents.
    """
    writings = {
        "plain": str,
        "backwards": lambda text: "\n".join(line[::-1] for line in text.split("\n")),
        "mirrored": lambda text: exchange(text, LETTERS[::-1]),
        "shifted_5": lambda text: exchange(text, LETTERS[5:] + LETTERS[:5]),
        "shifted_13": lambda text: exchange(text, LETTERS[13:] + LETTERS[:13]),
    }
    lines = zen_of_python().splitlines(keepends=True)
    pairs = ["".join(lines[first : first + 2]) for first in range(0, len(lines), 2)]
    return split_genres([(genre, write(pair)) for genre, write in writings.items() for pair in pairs])


def exchange(text: str, letters: str) -> str:
    """Write other letters, given in place of the alphabet's, capitals likewise."""
    return text.translate(str.maketrans(LETTERS + LETTERS.upper(), letters + letters.upper()))


def sample_windows(text: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text that begin anywhere: (batch_size, length) int64.

    Raises:
        ValueError: if the text is shorter than a piece.
    """
    if len(text) < length:
        raise ValueError(f"a text of {len(text)} tokens has no piece of {length}: use a smaller context")
    starts = torch.randint(len(text) - length + 1, (batch_size, 1), generator=generator)
    return text[starts + torch.arange(length)].long()
