"""The studies of meta-learning, shortened to a few steps: what they promise to print, and that they are fair."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from modmoe.cli import main
from modmoe.experiments import load_config_class
from modmoe.experiments.meta import FamiliesConfig, FewShotConfig, GaussianProcessConfig, GrowthConfig
from modmoe.experiments.meta import ImageCompletionConfig as ImagesConfig
from modmoe.experiments.meta.families import CLAIMS, DRAWN
from modmoe.experiments.meta.families_settings import METHODS, make_learner
from modmoe.experiments.meta.growth import padded, rises, summary
from modmoe.growth import count_parameters
from modmoe.meta import TaskBatch

CONFIGS = Path(__file__).parents[3] / "configs" / "meta"


def run(tmp_path_factory, name, **small):
    out = tmp_path_factory.mktemp(name)
    options = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    assert main(["run", str(CONFIGS / f"{name}.yaml"), "--seeds", "1", *options, "--out", str(out)]) == 0
    methods = json.loads((out / "metrics.json").read_text())["methods"]
    return {m: {k: v["mean"] for k, v in of.items()} for m, of in methods.items()}, (out / "report.html").read_text()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    small = {"process_iterations": 2, "evidence_iterations": 2, "maml_iterations": 2}
    return run(tmp_path_factory, "five_families", **small, evaluation_tasks=6, num_samples=2)


def test_five_families_methods_and_metrics(families):
    methods, report = families
    assert list(methods) == METHODS
    splits = ["", *(f"/{v}" for v in "ab"), *(f"/{v}/{c}" for v in "ab" for c in (3, 5, 10))]
    wanted = {metric + split for metric in ("nll_marginal", "nll_joint", "mse") for split in splits}
    for metrics in methods.values():
        assert wanted | {"parameters", "seconds"} <= metrics.keys()
        assert metrics["mse"] == pytest.approx((metrics["mse/a"] + metrics["mse/b"]) / 2)
    assert report.count("data:image/png") >= len(DRAWN)
    assert "family of the point" in report


def test_five_families_differences_are_those_of_the_rows(families):
    methods = families[0]
    for claim in CLAIMS:
        key = claim.metric + (f"/{claim.variant}" if claim.variant else "")
        expected = methods[claim.first][key] - methods[claim.second][key]
        assert methods[claim.first][f"difference/{claim.name}"] == pytest.approx(expected, abs=1e-6)
        assert methods[claim.first][f"half_width/{claim.name}"] > 0


def test_five_families_matched_parameters(families):
    parameters = {method: metrics["parameters"] for method, metrics in families[0].items()}
    assert parameters["bem_k3"] == 9918
    assert parameters["bem_k1"] == pytest.approx(parameters["bem_k3"], rel=0.01)
    for method in ("np", "mdn_cnp", "moe_np"):
        assert parameters[method] == pytest.approx(parameters["cnp"], rel=0.01)
    assert parameters["cnp"] == 66_946
    assert parameters["maml_wide"] == pytest.approx(parameters["maml_routed"], rel=0.01)


def test_evaluation_is_shared_fresh_and_paired_over_contexts():
    config = FamiliesConfig(evaluation_tasks=4)
    sets, again = config.evaluation_sets(0), config.evaluation_sets(0)
    assert list(sets) == [(v, c) for v in "ab" for c in ("3", "5", "10")]
    assert all(torch.equal(sets[key].batch.target_y, again[key].batch.target_y) for key in sets)
    assert torch.equal(sets["a", "3"].batch.target_y, sets["a", "10"].batch.target_y)
    assert not torch.equal(sets["a", "3"].batch.target_x, sets["b", "3"].batch.target_x)
    assert not torch.equal(sets["a", "3"].batch.target_y, config.evaluation_sets(1)["a", "3"].batch.target_y)


def test_the_noise_of_maml_is_its_error_elsewhere():
    config = FamiliesConfig(maml_iterations=1)
    learner = make_learner(config, "maml", 0)
    config.calibrate(learner, 0)
    # an untrained network is wrong by about the spread of y / 3, which is of the order of 1
    assert 0.2 < learner.model.noise_std < 5


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    small = {"iterations": 4, "evaluation_tasks": 4, "calibration_tasks": 20}
    return run(tmp_path_factory, "growing_families", **small, families="[sine,line,tanh]")


def test_growing_families(growing):
    methods, report = growing
    assert list(methods) == ["pool", "pool_novelty", "naive", "joint"]
    for name in ("pool", "pool_novelty"):
        assert methods[name]["rise_masked"] == 0
        assert {"rise_gated", "rise_gated_max", "new_family_gap", "num_experts"} <= methods[name].keys()
    assert methods["pool"]["num_experts"] == 3
    assert {"grown", "grown/line", "grown/tanh"} <= methods["pool_novelty"].keys()
    assert methods["pool"]["parameters"] == methods["joint"]["parameters"] == methods["naive"]["parameters"]
    assert "NLL after each family" in report
    assert report.count("data:image/png") == 4


def test_rises_by_hand():
    rows = [[1.0, 5.0, 9.0], [1.2, 2.0, 9.0], [1.3, 2.4, 3.0]]
    task = torch.tensor
    masked = [[task([1.0, 1.0])], [task([1.0, 1.5]), task([2.0])], [task([1.0, 1.0]), task([1.75]), task([3.0])]]
    found = rises(rows, masked)
    # gated: .2, then (.1 + .4) / 2; masked: 1.5 - 1 beats 2 - 1.75
    assert found == pytest.approx({"rise_masked": 0.5, "rise_gated": 0.225, "rise_gated_max": 0.25})
    # in the end the mean is (1.3 + 2.4 + 3) / 3; rises .3 and .4
    assert summary(torch.tensor(rows).numpy()) == pytest.approx({"nll": 6.7 / 3, "rise": 0.35})


def test_contexts_of_several_sizes_as_one_batch():
    parts = [TaskBatch(torch.ones(2, n, 1), torch.ones(2, n, 1), torch.ones(2, 4, 1)) for n in (1, 3)]
    both = padded(parts)
    assert both.present.sum(1).tolist() == [1, 1, 3, 3]
    assert both.context_x.shape == (4, 3, 1)


def test_gp(tmp_path_factory):
    methods, report = run(tmp_path_factory, "gp", iterations=2, evaluation_tasks=4, num_samples=2)
    assert list(methods) == ["cnp", "np", "anp", "moe_np", "oracle"]
    for kernel in ("rbf", "matern52", "periodic"):
        name = f"log_likelihood/{kernel}"
        for method in ("cnp", "np", "anp", "moe_np"):
            assert methods[method][f"gap/{kernel}"] == pytest.approx(methods["oracle"][name] - methods[method][name])
            assert methods[method][f"gap/{kernel}"] > 0  # nobody beats the one who knows, least of all untrained
    for method in ("np", "anp", "moe_np"):
        assert methods[method]["parameters"] == pytest.approx(methods["cnp"]["parameters"], rel=0.01)
    assert report.count("data:image/png") == 12


def test_image_completion(tmp_path_factory):
    methods, report = run(tmp_path_factory, "image_completion", iterations=2, evaluation_tasks=9, num_samples=2)
    assert list(methods) == ["cnp", "np", "anp", "moe_np"]
    for metrics in methods.values():
        assert {f"{m}{s}" for m in ("nll", "mse") for s in ("", "/10", "/30", "/50")} <= metrics.keys()
        assert metrics["parameters"] == pytest.approx(methods["cnp"]["parameters"], rel=0.01)
    assert report.count("data:image/png") == 4


def test_pictures_of_training_and_test_are_different_ones():
    train, test = ImagesConfig().load(0)
    assert (len(train.images), len(test.images)) == (1348, 449)  # a quarter of 1797


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fetch_data.py glyphs --root"):
        FewShotConfig(data="glyphs", root=str(tmp_path)).load(0)


def test_fewshot(tmp_path_factory):
    small = {"iterations": 2, "maml_iterations": 2, "evaluation_tasks": 30}
    methods, report = run(tmp_path_factory, "fewshot", **small)
    assert list(methods) == ["pixel_prototypes", "protonet", "maml", "moe_np", "bem"]
    assert methods["pixel_prototypes"]["accuracy"] > 0.5  # 5 ways of digits: chance is .2
    for method, metrics in methods.items():
        assert {"accuracy", "half_width/accuracy", "nll", "seconds"} <= metrics.keys()
        if method != "pixel_prototypes":
            assert metrics["parameters"] == pytest.approx(50_000, rel=0.02)
            difference = metrics["accuracy"] - methods["pixel_prototypes"]["accuracy"]
            name = f"{method}-pixel_prototypes/accuracy"
            assert metrics[f"difference/{name}"] == pytest.approx(difference, abs=1e-6)
            assert metrics[f"half_width/{name}"] > 0
    assert report.count("data:image/png") == 1


def test_fewshot_classes_of_the_test_were_not_trained_on():
    train, test = FewShotConfig().load(0)
    assert not set(train.class_labels.tolist()) & set(test.class_labels.tolist())
    assert (train.num_classes, test.num_classes) == (20, 5)  # five digits each, those of training in four turns


@pytest.mark.parametrize("method", ["protonet", "bem", "maml"])
def test_fewshot_learns(method):
    from modmoe.experiments.meta.fewshot import evaluate
    from modmoe.experiments.meta.fewshot_methods import make_model

    config = FewShotConfig(iterations=30, maml_iterations=12, tasks=4, learning_rate=5e-3)
    train, _ = config.load(0)
    episodes = train.sample(40, 5, 1, 3, torch.Generator().manual_seed(1))
    model = make_model(method, 8, 5, 0)
    before = evaluate(model, episodes)[1]
    config.train(model, method, train, 0)
    assert evaluate(model, episodes)[1] < before - (0.02 if method == "maml" else 0.1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_known_keys(path):
    settings = yaml.safe_load(path.read_text())
    kind = load_config_class(settings.pop("experiment"))
    assert settings.pop("seeds") >= 3
    assert settings.keys() <= {field.name for field in dataclasses.fields(kind)}
    kind(**settings)
    assert path.read_text().startswith("#"), "a header says cost, seeds and what is compared"


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (FamiliesConfig, {"maml_iterations": 0}, "must be at least 1"),
        (FamiliesConfig, {"methods": []}, "methods must name at least one"),
        (FamiliesConfig, {"contexts": [3, 3]}, "contexts must name at least one and none twice"),
        (FamiliesConfig, {"contexts": [0]}, "at least one point"),
        (GrowthConfig, {"families": ["sine", "cosine"]}, "unknown family 'cosine'"),
        (GrowthConfig, {"families": ["sine"]}, "two families at least"),
        (GrowthConfig, {"calibration_tasks": 10}, "calibration_tasks times quantile must be at least 1"),
        (GaussianProcessConfig, {"tasks": 0}, "must be at least 1"),
        (ImagesConfig, {"percent": [1]}, "from 5 to 100"),
        (FewShotConfig, {"ways": 1}, "ways must be at least 2"),
        (FewShotConfig, {"methods": ["bem"]}, "start with 'pixel_prototypes'"),
    ],
)
def test_settings_that_cannot_work(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_a_wrong_key_fails(capsys):
    assert main(["run", str(CONFIGS / "five_families.yaml"), "--maml_iteration", "1"]) != 0
    assert "did you mean 'maml_iterations'?" in capsys.readouterr().err


def test_equal_seeds_give_equal_weights():
    first, second = (make_learner(FamiliesConfig(), "moe_np", 3).model for _ in range(2))
    assert count_parameters(first).total == 66_697
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
