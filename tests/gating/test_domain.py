"""DomainRouter: known domains, the posterior by hand, the prior, growth."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe import DomainRouter, ExpertPool, MLPExpert, MoELayer

UNKNOWN = torch.full((4,), -1)


def layer_of(num_experts: int = 3, decay: float = 0.9) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(2, 3), num_experts), DomainRouter(2, decay))


def prior(layer: MoELayer) -> list[float]:
    return layer.pool.namespace(layer.namespace)["prior"].tolist()


def test_a_known_domain_uses_its_expert_alone():
    layer, x = layer_of(), torch.randn(4, 2)
    ids = torch.tensor([2, 0, 0, 1])
    y = layer(x, ids=ids)
    assert layer.routing.load.tolist() == [2, 1, 1]  # the others compute nothing
    assert_close(layer.routing.matrix(), torch.eye(3)[ids])
    for t, expert_id in enumerate(ids.tolist()):
        assert_close(y[t], layer.expert_output(expert_id, x[t]))


def test_several_experts_of_a_domain_share_it():
    layer = layer_of()
    layer.router.assign_domain(layer.pool, layer.namespace, 0, 7)
    layer.router.assign_domain(layer.pool, layer.namespace, 2, 7)
    matrix = layer.route(torch.zeros(2, 2), ids=torch.tensor([7, 1])).matrix()
    assert matrix.tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="the domain has no open expert: token 1 of 2"):
        layer.route(torch.zeros(2, 2), ids=torch.tensor([7, 0]))  # expert 0 has left its own domain
    only_two = layer.route(torch.zeros(1, 2), ids=torch.tensor([7]), expert_mask=torch.tensor([False, True, True]))
    assert only_two.matrix().tolist() == [[0.0, 0.0, 1.0]]


def test_the_posterior_by_hand():
    layer = layer_of().eval()
    x = torch.randn(2, 2, 2)
    # two sequences of two tokens; p(history | e) = 1, 2, 1 and 3, 0+, 1 up to a factor; the prior is equal
    log_likelihood = torch.tensor([[0.0, math.log(2.0), 0.0], [math.log(3.0) - 500, -2000.0, -500.0]])
    with layer.router.evidence(log_likelihood):
        y = layer(x)
    matrix = layer.routing.matrix()
    assert_close(matrix, torch.tensor([[0.25, 0.5, 0.25]] * 2 + [[0.75, 0.0, 0.25]] * 2))
    assert layer.routing.load.tolist() == [4, 2, 4]  # nothing is computed for a weight of exactly 0
    for b in range(2):
        for s in range(2):
            mixture = sum(matrix[2 * b + s, e] * layer.expert_output(e, x[b, s]) for e in range(3))
            assert_close(y[b, s], mixture)
    assert layer.routing.choices[0, 0] == 1  # the best first
    assert_close(layer.route(x).matrix(), torch.full((4, 3), 1 / 3))  # after the block: the prior


def test_a_history_for_each_token_and_known_domains_beside():
    layer = layer_of(2).eval()
    log_likelihood = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 9.0], [0.0, 9.0]])
    with layer.router.evidence(log_likelihood):
        matrix = layer.route(torch.zeros(4, 2), ids=torch.tensor([-1, -1, 0, 1])).matrix()
    assert_close(matrix, torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.0, 1.0]]))


def test_the_prior_moves_in_evaluation_by_hand():
    layer = layer_of(2, decay=0.75).eval()
    mask = torch.tensor([True, True, True, False])
    with layer.router.evidence(torch.tensor([[math.log(3.0), 0.0]])):
        layer.route(torch.zeros(4, 2), mask=mask)
    layer.update_router()
    # posterior 3/4 and 1/4; as shares of the average 1.5 and .5: .75 * 1 + .25 * 1.5 = 1.125, .75 + .25 * .5 = .875
    assert prior(layer) == pytest.approx([1.125, 0.875])
    assert_close(layer.route(torch.zeros(1, 2)).matrix(), torch.tensor([[1.125 / 2, 0.875 / 2]]))
    layer.train()
    layer.route(torch.zeros(4, 2), ids=torch.zeros(4, dtype=torch.int64))
    layer.update_router()  # a training step counts its own domain only
    assert prior(layer) == pytest.approx([1.125, 0.875])


def test_the_prior_never_reaches_zero():
    layer = layer_of(2, decay=0.0).eval()
    with layer.router.evidence(torch.tensor([[0.0, -1e6]])):
        layer.route(torch.zeros(1, 2))
    layer.update_router()
    assert prior(layer) == pytest.approx([2.0, 1e-6])
    assert layer.route(torch.zeros(1, 2)).weight.isfinite().all()


def test_growth_freezing_and_loading():
    layer = layer_of(2, decay=0.5).eval()
    layer.freeze([0])
    with layer.router.evidence(torch.tensor([[math.log(3.0), 0.0]])):
        layer.route(torch.zeros(4, 2))
    layer.update_router()
    assert prior(layer) == pytest.approx([1.0, 0.75])  # the frozen one stays; .5 + .5 * .5
    layer.add_experts(1)
    assert prior(layer) == pytest.approx([1.0, 0.75, 1.0])
    assert layer.route(torch.zeros(1, 2), ids=torch.tensor([2])).matrix().tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="expert 0 is frozen"):
        layer.router.assign_domain(layer.pool, layer.namespace, 0, 5)
    loaded = layer_of(1).eval()
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.route(torch.zeros(1, 2)).matrix(), layer.route(torch.zeros(1, 2)).matrix())
    layer.remove([1])  # the domains of the others stay
    assert layer.route(torch.zeros(1, 2), ids=torch.tensor([2])).matrix().tolist() == [[0.0, 1.0]]


def test_padding_needs_no_domain():
    layer = layer_of()
    mask = torch.tensor([True, False])
    assert layer.route(torch.zeros(2, 2), mask=mask, ids=torch.tensor([1, 99])).load.tolist() == [0, 1, 0]


def test_bad_input():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        DomainRouter(2, 1.0)
    with pytest.raises(ValueError, match="DomainRouter needs a domain id for each token"):
        layer.route(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="the posterior mixes all experts"):
        layer.route(torch.zeros(4, 2), ids=UNKNOWN, top_k=1)
    with pytest.raises(ValueError, match="a domain is at least 0, got -1"):
        layer.router.assign_domain(layer.pool, layer.namespace, 0, -1)
    with layer.router.evidence(torch.zeros(3, 3)), pytest.raises(ValueError, match=r"a log-likelihood \(B, 3\)"):
        layer.route(torch.zeros(4, 2), ids=UNKNOWN)
