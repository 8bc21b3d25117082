"""StickRouter: the stick by hand and against the textbook form, ridge heads, shared state, density, errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert
from modmoe.gating.classwise import DENSITY, PartOfRows
from modmoe.gating.ppca import PPCARouter
from modmoe.gating.stick import StickRouter


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_for(router: StickRouter, num_experts: int = 1) -> ExpertPool:
    pool = ExpertPool(MLPExpert(router.in_features, 4), num_experts)
    pool.declare("gate", router.row_specs())
    return pool


def blobs(num_classes: int = 6, n: int = 40, D: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num_classes).repeat_interleave(n)
    centres = 2 * torch.randn(num_classes, D, generator=generator(1))
    return centres[labels] + torch.randn(len(labels), D, generator=generator(2)), labels


def stream(router: StickRouter, x: Tensor, labels: Tensor, num_tasks: int = 3) -> ExpertPool:
    """One expert for every two classes, observed in order and frozen."""
    pool = pool_for(router)
    for task in range(num_tasks):
        expert_id = pool.ids[0] if task == 0 else pool.add_experts(1)[0]
        mine = labels // 2 == task
        router.observe(pool, "gate", expert_id, x[mine], labels[mine])
        pool.freeze([expert_id])
    return pool


def heads(pool: ExpertPool, expert_id: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = pool.namespace("gate", [expert_id])
    return rows["weight"], rows["label"], rows["own"]


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_stick_by_hand():
    # Heads that read the constant only, sharpness 1. Expert 0 owns class 0 (head: P = 1). Expert 1 owns class 1, with
    # logits log 3 (class 0) and 0 (class 1): P(older) = 3/4, P(own) = 1/4. Expert 2 owns class 2, with logits 0, 0 and
    # log 2: P(older) = 1/2, P(own) = 1/2. So p = (1 * 3/4 * 1/2, 1/4 * 1/2, 1/2) = (3/8, 1/8, 1/2).
    router = StickRouter(1, 3, sharpness=1.0)
    pool = pool_for(router, 3)
    logits = [[0.0], [math.log(3.0), 0.0], [0.0, 0.0, math.log(2.0)]]
    for expert_id, values in enumerate(logits):
        rows = {
            "label": torch.arange(expert_id + 1),
            "own": torch.arange(expert_id + 1) == expert_id,
            "weight": torch.tensor([[0.0, value] for value in values]),
        }
        pool.add_rows("gate", expert_id, rows)
    x = torch.tensor([[7.0]])
    assert_close(router.score(x, pool.namespace("gate")).softmax(1), torch.tensor([[3 / 8, 1 / 8, 1 / 2]]))
    # what is stored as score: log P_t(own) - sum_{s <= t} log P_s(older)
    expected = [0.0, math.log(1 / 4 / (3 / 4)), math.log(1 / 2 / (3 / 4) / (1 / 2))]
    assert_close(router.score(x, pool.namespace("gate")), torch.tensor([expected]))
    joint, labels = router.class_log_joint(x, pool.namespace("gate"))
    assert labels.tolist() == [0, 1, 2]
    assert_close(joint.softmax(1), torch.tensor([[3 / 8, 1 / 8, 1 / 2]]))


def test_head_by_hand():
    # x = 1 (class 0) and x = -1 (class 1), a constant 1, ridge 2: Gram = diag(2, 2) + 2 I = 4 I, moments
    # [[1, -1], [1, 1]], so the heads are (1/4, 1/4) and (-1/4, 1/4)
    router = StickRouter(1, 2, ridge=2.0)
    pool = pool_for(router)
    router.observe(pool, "gate", 0, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    weight, labels, own = heads(pool, 0)
    assert_close(weight, torch.tensor([[0.25, 0.25], [-0.25, 0.25]]))
    assert labels.tolist() == [0, 1]
    assert own.tolist() == [True, True]


def test_stick_equals_the_textbook_form():
    x, labels = blobs()
    router = StickRouter(5, 6, sharpness=5.0, ridge=1.0)
    pool = stream(router, x, labels)
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    log_p = torch.zeros(len(x), 6, dtype=torch.float64)
    log_older = torch.zeros(len(x), dtype=torch.float64)
    for task in (2, 1, 0):  # newest first
        weight, head_labels, own = heads(pool, task)
        probs = (5.0 * inputs @ weight.double().T).softmax(1)
        log_p[:, head_labels[own]] = probs[:, own].log() + log_older.unsqueeze(1)
        if task:
            log_older = log_older + probs[:, ~own].sum(1).log()
    assert_close(log_p.exp().sum(1), torch.ones(len(x), dtype=torch.float64))
    joint, order = router.class_log_joint(x, pool.namespace("gate"))
    assert_close(joint.double().log_softmax(1), log_p[:, order], rtol=1e-4, atol=1e-4)
    experts = router.score(x, pool.namespace("gate")).softmax(1)
    assert_close(experts.double(), log_p.exp().view(-1, 3, 2).sum(2), rtol=1e-4, atol=1e-6)


def test_heads_equal_ridge_regression_over_everything_seen():
    x, labels = blobs()
    pool = stream(StickRouter(5, 6, ridge=3.0), x, labels)
    seen = labels < 4  # at the second expert
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1)[seen].double()
    targets = torch.nn.functional.one_hot(labels[seen]).double()
    exact = torch.linalg.solve(inputs.T @ inputs + 3 * torch.eye(6, dtype=torch.float64), inputs.T @ targets).T
    weight, head_labels, own = heads(pool, 1)
    assert head_labels.tolist() == [0, 1, 2, 3]
    assert own.tolist() == [False, False, True, True]
    assert_close(weight.double(), exact, rtol=1e-4, atol=1e-5)


def test_observed_in_parts():
    x, labels = blobs(2)
    whole, parts = StickRouter(5, 2, ridge=1.0), StickRouter(5, 2, ridge=1.0)
    pools = pool_for(whole), pool_for(parts)
    whole.observe(pools[0], "gate", 0, x, labels)
    for part in torch.arange(len(x)).split(13):  # class 1 comes late
        parts.observe(pools[1], "gate", 0, x[part], labels[part])
    assert heads(pools[1], 0)[1].tolist() == [0, 1]
    assert_close(heads(pools[1], 0)[0], heads(pools[0], 0)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.class_counts, parts.class_counts)


def test_classes_that_come_late_follow_the_older_ones():
    x, labels = blobs(4)
    router = StickRouter(5, 4)
    pool = pool_for(router, 2)
    order = [(0, 1), (1, 3), (1, 0), (1, 2)]  # expert 0 has class 1, expert 1 the classes 3, 0 and 2
    for expert_id, label in order:
        router.observe(pool, "gate", expert_id, x[labels == label], labels[labels == label])
    _, head_labels, own = heads(pool, 1)
    assert head_labels.tolist() == [1, 3, 0, 2]
    assert own.tolist() == [False, True, True, True]


def test_the_order_is_that_of_observing_not_of_ids():
    x, labels = blobs(4)
    router = StickRouter(5, 4, ridge=1.0)
    pool, swapped = pool_for(router, 2), pool_for(router, 2)
    for task, expert_id in enumerate((0, 1)):
        router.observe(pool, "gate", expert_id, x[labels // 2 == task], labels[labels // 2 == task])
    again = StickRouter(5, 4, ridge=1.0)
    for task, expert_id in enumerate((1, 0)):
        again.observe(swapped, "gate", expert_id, x[labels // 2 == task], labels[labels // 2 == task])
    scores = router.score(x, pool.namespace("gate"))
    assert_close(again.score(x, swapped.namespace("gate")), scores.flip(1))


# -- freezing, shared state --------------------------------------------------------------------------------------------


def test_growth_leaves_scores_and_rows_to_the_bit():
    x, labels = blobs()
    router = StickRouter(5, 6)
    pool = stream(router, x, labels, num_tasks=2)
    before, states = router.score(x, pool.namespace("gate")), [pool.expert_state(i) for i in pool.ids]
    new = pool.add_experts(1)[0]
    router.observe(pool, "gate", new, x[labels >= 4], labels[labels >= 4])
    assert torch.equal(router.score(x, pool.namespace("gate"))[:, :2], before)
    for expert_id, state in enumerate(states):
        assert all(torch.equal(pool.expert_state(expert_id)[name], tensor) for name, tensor in state.items())


def test_frozen_shared_state_is_not_written():
    x, labels = blobs(4)
    router = StickRouter(5, 4)
    pool = pool_for(router, 2)
    router.observe(pool, "gate", 0, x[labels < 2], labels[labels < 2])
    router.freeze_shared()
    before = {name: tensor.clone() for name, tensor in router.named_buffers()}
    with pytest.raises(ValueError, match="shared moments are frozen"):
        router.observe(pool, "gate", 1, x[labels >= 2], labels[labels >= 2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.named_buffers())
    router.freeze_shared(False)
    router.observe(pool, "gate", 1, x[labels >= 2], labels[labels >= 2])
    assert router.class_counts.tolist() == [40, 40, 40, 40]


def test_shared_state_is_saved_and_the_stream_goes_on():
    x, labels = blobs()
    whole = StickRouter(5, 6)
    expected = stream(whole, x, labels)
    first = StickRouter(5, 6)
    pool = stream(first, x, labels, num_tasks=2)
    router, loaded = StickRouter(5, 6), pool_for(StickRouter(5, 6))
    router.load_state_dict(first.state_dict())
    loaded.load_state_dict(pool.state_dict())
    new = loaded.add_experts(1)[0]
    router.observe(loaded, "gate", new, x[labels >= 4], labels[labels >= 4])
    assert torch.equal(router.score(x, loaded.namespace("gate")), whole.score(x, expected.namespace("gate")))


def test_three_blobs_to_a_threshold():
    x, labels = blobs()
    router = StickRouter(5, 6, ridge=1.0)
    pool = stream(router, x, labels)
    joint, order = router.class_log_joint(x, pool.namespace("gate"))
    assert (order[joint.argmax(1)] == labels).float().mean() > 0.85
    assert (router.score(x, pool.namespace("gate")).argmax(1) == labels // 2).float().mean() > 0.85


# -- with a density ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
def test_density_is_added_class_by_class(sliced: bool):
    x, labels = blobs()
    density = PPCARouter(2 if sliced else 5, components=1, rank=1)
    settings = {"density_slice": (1, 3)} if sliced else {}
    router = StickRouter(5, 6, density=density, density_weight=0.5, **settings)
    pool = stream(router, x, labels)
    plain = StickRouter(3 if sliced else 5, 6)
    seen = x[:, [0, 3, 4]] if sliced else x
    plain_pool = stream(plain, seen, labels)
    alone = pool_for(StickRouter(5, 6))  # the density as a gate of its own
    alone.declare("density", density.row_specs())
    read = x[:, 1:3] if sliced else x
    density.observe(alone, "density", 0, read, labels)
    joint, order = router.class_log_joint(x, pool.namespace("gate"))
    stick, stick_order = plain.class_log_joint(seen, plain_pool.namespace("gate"))
    assert order.tolist() == stick_order.tolist() == list(range(6))
    expected = stick + 0.5 * density.class_score(read, alone.namespace("density"))
    assert_close(joint, expected, rtol=1e-4, atol=1e-4)
    experts = router.score(x, pool.namespace("gate"))
    assert_close(experts, expected.view(-1, 3, 2).logsumexp(2), rtol=1e-4, atol=1e-4)


def test_a_density_that_takes_one_call_makes_the_gate_take_one_call():
    x, labels = blobs(2)
    router = StickRouter(5, 2, density=PPCARouter(5, components=1, rank=1))
    assert not router.streaming
    assert StickRouter(5, 2).streaming
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, labels)
    gram = router.gram
    with pytest.raises(ValueError, match="expert 0 has been fitted: StickRouter needs all of its data in one call"):
        router.observe(pool, "gate", 0, x, labels)
    assert router.gram is gram


def test_part_of_rows():
    pool = pool_for(StickRouter(5, 2, density=PPCARouter(5, components=1, rank=1)))
    part = PartOfRows(pool.namespace("gate"), DENSITY)
    assert set(part) == set(PPCARouter(5).row_specs())
    assert len(part) == 7
    assert part["mean"].shape == (0, 1, 5)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_bad_observations_change_nothing():
    x, labels = blobs(4)
    router = StickRouter(5, 4)
    pool = pool_for(router, 3)
    router.observe(pool, "gate", 0, x[labels < 2], labels[labels < 2])
    router.observe(pool, "gate", 1, x[labels == 2], labels[labels == 2])
    buffers, states = dict(router.named_buffers()), [pool.expert_state(i) for i in pool.ids]
    cases = [
        (0, 0, "only the expert that observed last may observe more"),
        (1, 1, r"the classes \[1\] belong to other experts"),
        (2, 2, r"the classes \[2\] belong to other experts"),
        (2, 4, r"labels in \[0, 4\) are needed, got \[4\]"),
        (2, -1, r"labels in \[0, 4\) are needed, got \[-1\]"),
    ]
    for expert_id, label, message in cases:
        with pytest.raises(ValueError, match=message):
            router.observe(pool, "gate", expert_id, x[:2], torch.tensor([label, label]))
    assert all(tensor is buffers[name] for name, tensor in router.named_buffers())
    for expert_id, state in enumerate(states):
        assert all(torch.equal(pool.expert_state(expert_id)[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"sharpness": 0.0}, "sharpness and ridge must be positive"),
        ({"ridge": 0.0}, "sharpness and ridge must be positive"),
        ({"density_weight": -1.0}, "density_weight not negative"),
        ({"density_slice": (0, 2)}, "density_slice without a density"),
        ({"density": PPCARouter(3)}, r"columns 0 to 4 of 4 features has to take 4, it takes 3"),
        ({"density": PPCARouter(3), "density_slice": (1, 3)}, "columns 1 to 3 of 4 features has to take 2, it takes 3"),
        ({"density": PPCARouter(3), "density_slice": (2, 5)}, "columns 2 to 5 of 4 features"),
        ({"density": PPCARouter(4), "density_slice": (0, 4)}, r"slice \(0, 4\) leaves no feature to the heads"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StickRouter(**{"in_features": 4, "num_classes": 3, **settings})


# -- observing in parts, settled once ----------------------------------------------------------------------------------


def test_parts_settled_once_equal_one_observation():
    x, labels = blobs()
    router, whole = StickRouter(5, 6), StickRouter(5, 6)
    pool, expected = pool_for(router), stream(whole, x, labels, 1)
    mine = labels < 2
    for part in torch.arange(80).split(7):
        router.observe(pool, "gate", 0, x[mine][part], labels[mine][part], settle=False)
    assert not heads(pool, 0)[0].any()  # its head has not been solved at all
    router.settle(pool, "gate", 0)
    assert int(router.unsettled) == -1
    for got, wanted in zip(heads(pool, 0), heads(expected, 0), strict=True):
        assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_an_unsettled_expert_is_in_the_way_of_the_next_one():
    x, labels = blobs()
    router = StickRouter(5, 6)
    pool = pool_for(router, 2)
    router.observe(pool, "gate", 0, x[:80], labels[:80], settle=False)
    with pytest.raises(ValueError, match="expert 0 has not been settled"):
        router.observe(pool, "gate", 1, x[80:], labels[80:])
    pool.freeze([0])
    with pytest.raises(ValueError, match="frozen before it was settled"):
        router.settle(pool, "gate", 0)
    pool.unfreeze([0])
    router.settle(pool, "gate", 0)
    pool.freeze([0])
    router.settle(pool, "gate", 0)  # nothing is left to do
    router.observe(pool, "gate", 1, x[80:], labels[80:])


def test_a_removed_expert_needs_no_settling():
    x, labels = blobs()
    router = StickRouter(5, 6)
    pool = pool_for(router, 2)
    router.observe(pool, "gate", 0, x[:80], labels[:80], settle=False)
    pool.remove([0])
    router.observe(pool, "gate", 1, x[80:], labels[80:])
    assert int(router.unsettled) == -1


def test_ridge_scores_are_those_of_one_regression():
    x, labels = blobs()
    router = StickRouter(5, 6, ridge=3.0)
    stream(router, x, labels)
    scores, classes = router.ridge_scores(x[::11])
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    targets = torch.nn.functional.one_hot(labels, 6).double()
    weight = torch.linalg.solve(inputs.T @ inputs + 3.0 * torch.eye(6, dtype=torch.float64), inputs.T @ targets)
    assert classes.tolist() == list(range(6))
    assert_close(scores, (inputs[::11] @ weight).float(), atol=1e-5, rtol=1e-4)
