"""Bytes, the texts, and pieces of them."""

import json

import pytest
import torch

from modmoe.language import ByteTokenizer, load_brown, sample_windows, split_genres, zen_genres, zen_of_python


def test_bytes_there_and_back():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    for text in ("", "naïve text\n", zen_of_python()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(torch.tensor([97, 0xC3])) == "a\ufffd"
    for wrong in (torch.tensor([256]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match=r"bytes lie in|shape \(n,\)"):
            tokenizer.decode(wrong)


def test_the_zen_is_what_it_is(capsys):
    assert zen_of_python().startswith("The Zen of Python, by Tim Peters\n\nBeautiful")
    assert capsys.readouterr().out == ""
    genres = zen_genres()
    assert list(genres) == ["plain", "backwards", "mirrored", "shifted_5", "shifted_13"]
    texts = {name: ByteTokenizer().decode(genre.text) for name, genre in genres.items()}
    assert texts["backwards"].startswith("sreteP miT yb ,nohtyP fo neZ ehT\n\n")
    assert "Yvzfgrufo rh yvggvi gszm ftob." in texts["mirrored"]
    assert "Gjfzynkzq nx gjyyjw ymfs zlqd." in texts["shifted_5"]
    assert "Ornhgvshy vf orggre guna htyl." in texts["shifted_13"]
    # every sixth of 11 pairs of lines is held out: one
    assert [(len(genre.train), len(genre.validation)) for genre in genres.values()] == [(10, 1)] * 5


def test_documents_are_held_out_by_their_number():
    documents = [("a", f"text {number}") for number in range(13)]
    genre = split_genres(documents)["a"]
    decode = ByteTokenizer().decode
    assert [decode(text) for text in genre.validation] == ["text 5", "text 11"]
    assert len(genre.train) == 11
    assert [len(text) for text in genre.held_out(10)] == [6, 4]
    assert [len(text) for text in genre.held_out(7)] == [6]  # one token alone is not predicted
    with pytest.raises(ValueError, match="'b' has 1 documents"):
        split_genres([*documents, ("b", "x")])


def test_brown_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fetch_data\.py brown --root"):
        load_brown(tmp_path)
    path = tmp_path / "brown" / "brown.json"
    path.parent.mkdir()
    texts = [{"name": f"{g}{i}", "genre": g, "text": f"{g} {i} .\n"} for g in ("news", "lore") for i in range(6)]
    path.write_text(json.dumps(texts))
    genres = load_brown(tmp_path)
    assert list(genres) == ["news", "lore"]
    assert ByteTokenizer().decode(genres["lore"].validation[0]) == "lore 5 .\n"
    path.write_text('{"genre": ')
    with pytest.raises(ValueError, match="is damaged"):
        load_brown(tmp_path)


def test_windows_are_pieces_of_the_text():
    text = torch.arange(10).byte()
    windows = sample_windows(text, 50, 4, torch.Generator().manual_seed(0))
    assert windows.dtype == torch.int64
    assert ((windows[:, 1:] - windows[:, :-1]) == 1).all()
    assert set(windows[:, 0].tolist()) == set(range(7))
    with pytest.raises(ValueError, match="a text of 10 tokens has no piece of 11"):
        sample_windows(text, 1, 11, torch.Generator())
