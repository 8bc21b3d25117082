import inspect
import json

import pytest

import modmoe.gating
from modmoe import DeepSeekV3Router, MLPExpert, NoisyTopKRouter, Router, TopKRouter, cli, make_router
from modmoe.catalog import ROUTERS, example_experts, example_routers, gate_tables, layer_class, why_not
from modmoe.gating.capacity import Capacity


def test_every_router_has_a_name_and_an_example():
    members = [getattr(modmoe.gating, name) for name in modmoe.gating.__all__]
    classes = {c for c in members if inspect.isclass(c) and issubclass(c, Router) and not inspect.isabstract(c)}
    assert set(ROUTERS.values()) == classes
    assert {type(router) for router in example_routers().values()} == classes


def test_a_router_by_name():
    router = make_router("deepseek_v3", 4, top_k=2, num_groups=2)
    assert isinstance(router, DeepSeekV3Router)
    assert (router.in_features, router.top_k, router.num_groups) == (4, 2, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk", {}, "unknown router 'topk'; did you mean 'top_k'"),
        ("zzz", {}, "unknown router 'zzz' .known: dense, top_k"),
        ("top_k", {"k": 2}, "router 'top_k': got an unexpected keyword argument 'k'; it takes .*top_k: int = 2"),
        ("stick", {}, "router 'stick': missing a required argument: 'num_classes'"),
        ("top_k", {"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_wrong_names_and_options(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_router(name, 4, **options)


def test_the_table_says_what_the_code_says():
    """A few rows as the papers have them, written by hand."""
    rows = {row["gate"]: row for row in gate_tables()["gates"]}
    facts = ("decides", "per", "causal", "stochastic", "weights", "active", "ids", "learns_from", "growth")
    expected = {
        "dense": ("choices", "token", True, False, "1", 8, None, "gradient", "split"),
        "top_k(top_k=1, renormalize=True)": ("choices", "token", True, False, "1", 1, None, "gradient", "tie"),
        "switch": ("choices", "batch", False, True, "<= 1", 1, None, "gradient", None),
        "relu": ("choices", "token", True, False, "any", 2, None, "gradient", "zero"),
        "expert_choice": ("triples", "batch", False, False, "<= 1", 2, None, "gradient", None),
        "hash": ("choices", "token", True, False, "1", 1, "token", "nothing", None),
        "domain": ("choices", "token", True, False, "1", 8, "domain", "nothing", None),
        "soft(slots=2)": ("slots", "sequence", False, False, "1", 8, None, "gradient", None),
        "lory(segment_length=2)": ("merges", "sequence", True, False, "1", 8, None, "gradient", "split"),
        "gaussian": ("choices", "token", True, False, "1", 1, None, "data", None),
    }
    assert {name: tuple(rows[name][fact] for fact in facts) for name in expected} == expected
    assert rows["cosine"]["shared"] == ("projection", "log_scale")


def test_a_capacity_is_decided_for_the_whole_batch():
    free, limited = TopKRouter(4, 2), TopKRouter(4, 2, capacity=Capacity(1.0))
    assert (free.scope, free.causal) == ("token", True)
    assert (limited.scope, limited.causal) == ("batch", False)
    assert NoisyTopKRouter(4).stochastic


def test_pairs_are_what_the_layers_accept():
    table = {row["gate"]: row for row in gate_tables()["pairs"]}
    assert table["expert_choice"]["mlp"] is None
    assert "gives triples" in table["expert_choice"]["attention"]
    assert table["switch"]["attention"] is None
    assert "looks ahead" in table["switch"]["causal_attention"]
    assert why_not(TopKRouter(16), example_experts()["attention"]) is None
    assert layer_class(MLPExpert(4, 4)).__name__ == "MoELayer"


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture):
    assert cli.main(["gates"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("deepseek_v3(top_k=2)") for line in lines) == 2
    assert any(line.split()[:4] == ["gate", "decides", "per", "causal"] for line in lines)
    assert any(line.startswith("(1) causal attention needs") for line in lines)
    assert cli.main(["gates", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(gate_tables()))


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture):
    assert cli.main(["gates", "--yaml"]) == 2
    assert "takes --json or nothing, got --yaml" in capsys.readouterr().err
    assert cli.main(["gate"]) == 2
    assert "did you mean" in capsys.readouterr().err
