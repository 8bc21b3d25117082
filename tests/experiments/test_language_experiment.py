"""``modmoe run`` on language: the methods and metrics of both studies, on the small text."""

import json
from pathlib import Path

import pytest
import yaml

from modmoe.cli import main
from modmoe.experiments.language import LanguageConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "language").glob("*.yaml"))
SMALL = ["--corpus", "zen", "--context", "16", "--features", "16", "--hidden_features", "16", "--batch_size", "4"]
PRESETS = ["dense", "switch", "gshard", "glam", "mixtral", "deepseek", "moa", "smear", "lory", "upcycled"]


def config_of(name):
    return next(path for path in CONFIGS if path.stem == name)


def run(name, out, *options):
    options = (*SMALL, "--genres", "[plain, backwards, mirrored]", "--num_experts", "4", "--seeds", "1", *options)
    assert main(["run", str(config_of(name)), *options, "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())["methods"]


def test_presets(tmp_path):
    methods = run("brown", tmp_path, "--steps", "2")
    assert list(methods) == PRESETS
    mean = {name: {key: value["mean"] for key, value in metrics.items()} for name, metrics in methods.items()}
    wanted = {"validation_loss", "perplexity", "parameters", "active_parameters", "seconds"}
    assert all(metrics.keys() == wanted for metrics in mean.values())
    for metrics in mean.values():
        assert 3 < metrics["validation_loss"] < 6  # log 256 = 5.5
        # gates of up to 2 * 2 * 8 rows of 16 beside 12,000 parameters
        assert metrics["active_parameters"] == pytest.approx(mean["dense"]["active_parameters"], abs=256)
    assert (tmp_path / "report.html").stat().st_size > 5_000


def test_genres(tmp_path):
    methods = run("genres", tmp_path, "--steps", "12")
    assert list(methods) == ["pool", "oracle", "naive", "joint"]
    mean = {name: {key: value["mean"] for key, value in metrics.items()} for name, metrics in methods.items()}
    genres = {f"perplexity/{name}" for name in ("plain", "backwards", "mirrored")}
    assert all({"perplexity", "parameters", "seconds", *genres} <= metrics.keys() for metrics in mean.values())
    assert mean["oracle"]["rise"] == mean["oracle"]["word_rise"] == 0.0
    assert mean["pool"]["rise"] <= 0.05
    assert mean["pool"]["rise"] < mean["naive"]["rise"]
    assert "rise" not in mean["joint"]
    for name in ("naive", "joint"):
        assert mean[name]["parameters"] == mean["pool"]["parameters"]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_has_a_header_and_known_keys(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "language"
    assert settings.pop("seeds") >= 3
    assert settings.keys() <= vars(LanguageConfig()).keys()
    LanguageConfig(**settings)
    assert path.read_text().startswith("#"), "a header says cost, seeds and the last result"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["pool"]}, "the study 'presets' has the methods"),
        ({"methods": ["dense", "dense"]}, "each once"),
        ({"study": "genres", "methods": ["naive"]}, "starts with 'pool'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**settings)


def test_genres_that_are_not_there():
    with pytest.raises(ValueError, match="'zen' has no genre 'plane'; did you mean 'plain'"):
        LanguageConfig(corpus="zen", genres=["plane"]).load()
    with pytest.raises(ValueError, match="at least two"):
        LanguageConfig(corpus="zen", study="genres", methods=["pool"], genres=["plain"]).run(0, lambda text: None)
