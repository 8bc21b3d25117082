import math

import numpy as np
import pytest
import torch

from modmoe.analysis.specialization import (
    assignment_accuracy,
    joint_distribution,
    mean_entropy,
    mutual_information,
    token_entropy,
    token_expert_information,
)


def test_joint_distribution_counts_pairs():
    tasks = torch.tensor([0, 0, 0, 1])
    experts = torch.tensor([0, 2, 2, 1], dtype=torch.int32)
    joint = joint_distribution(tasks, experts, num_tasks=2, num_experts=3)
    # pairs (0, 0), (0, 2) twice and (1, 1) of four samples
    expected = torch.tensor([[0.25, 0.0, 0.5], [0.0, 0.25, 0.0]], dtype=torch.float64)
    assert joint.dtype == torch.float64
    assert torch.equal(joint, expected)


def test_arrays_and_lists_do_as_well():
    assert torch.equal(
        joint_distribution(np.array([0, 1]), [1, 0], 2, 2), torch.tensor([[0.0, 0.5], [0.5, 0.0]]).double()
    )


@pytest.mark.parametrize(
    ("tasks", "experts", "message"),
    [
        ([], [], "tasks is empty"),
        ([[0]], [0], r"tasks must be 1-D, got shape \(1, 1\)"),
        ([0], [0.5], "experts must be integers"),
        ([0, 1], [0], "differ in length: 2 and 1"),
        ([0, -1], [0, 0], "tasks holds a negative number, -1"),
        ([0, 0], [0, -1], "experts holds a negative number, -1"),
        ([0, 2], [0, 0], "tasks holds 2, which is not below 2"),
        ([0, 1], [0, 3], "experts holds 3, which is not below 3"),
    ],
)
def test_joint_distribution_refuses(tasks, experts, message):
    with pytest.raises(ValueError, match=message):
        joint_distribution(torch.tensor(tasks), torch.tensor(experts), 2, 3)


@pytest.mark.parametrize(
    ("joint", "expected"),
    [
        # 0.8 ln(0.4 / 0.25) + 0.2 ln(0.1 / 0.25) = 0.8 * 0.470004 - 0.2 * 0.916291
        ([[0.4, 0.1], [0.1, 0.4]], 0.192745),
        ([[0.5, 0.0], [0.0, 0.5]], 0.693147),  # 2 * 0.5 ln(0.5 / 0.25) = ln 2
        ([[0.25, 0.25], [0.25, 0.25]], 0.0),  # ln(0.25 / 0.25) = 0
        ([[0.1, 0.3], [0.15, 0.45]], 0.0),  # independent: (0.4, 0.6) times (0.25, 0.75)
    ],
)
def test_mutual_information(joint, expected):
    assert mutual_information(torch.tensor(joint)) == pytest.approx(expected, abs=1e-6)
    assert mutual_information(np.array(joint)) == pytest.approx(expected, abs=1e-6)


def test_normalized_mutual_information_is_the_share_of_the_tasks_entropy():
    # H(task) = ln 2: 0.192745 / 0.693147
    assert mutual_information(torch.tensor([[0.4, 0.1], [0.1, 0.4]]), normalize=True) == pytest.approx(
        0.278072, abs=1e-6
    )
    # two experts of its own for each task still tell the task exactly
    exact = torch.tensor([[0.25, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25]])
    assert mutual_information(exact, normalize=True) == pytest.approx(1.0)
    # a single task leaves nothing to tell
    assert mutual_information(torch.tensor([[0.5, 0.5]]), normalize=True) == 0.0


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ([0.5, 0.5], r"got shape \(2,\)"),
        ([[]], "non-empty"),
        ([[1.5, -0.5]], "negative"),
        ([[0.5, 0.4]], "sums to 0.9"),
        ([[math.nan, 0.4]], "sums to nan"),
    ],
)
def test_mutual_information_refuses(joint, message):
    with pytest.raises(ValueError, match=message):
        mutual_information(torch.tensor(joint))


@pytest.mark.parametrize("owner", [{0: 0, 1: 1, 2: 1}, torch.tensor([0, 1, 1]), [0, 1, 1]])
def test_assignment_accuracy(owner):
    # owners of the samples' experts: 0, 1, 1, 1; tasks: 0, 0, 1, 1; three of four agree
    tasks, experts = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 2, 1])
    assert assignment_accuracy(tasks, experts, owner) == 0.75


def test_assignment_accuracy_refuses():
    tasks, experts = torch.tensor([0, 1]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"experts \[3\] have no owner"):
        assignment_accuracy(tasks, experts, {0: 0})
    with pytest.raises(ValueError, match="experts holds a negative number"):
        assignment_accuracy(tasks, torch.tensor([0, -1]), {0: 0})
    with pytest.raises(ValueError, match="owner must be 1-D"):
        assignment_accuracy(tasks, experts, torch.zeros(2, 2, dtype=torch.int64))


# Its softmax rows' entropies: 0.832396 twice (the second row is the first less 1), 0.665573 and 1.068445.
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


def test_entropies_by_hand():
    # (1, 0): 0; (1/2, 1/2): ln 2; their mean is (3/4, 1/4): .75 ln(4/3) + .25 ln 4 = 0.215762 + 0.346574
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert token_entropy(probs) == pytest.approx(math.log(2) / 2)
    assert mean_entropy(probs) == pytest.approx(0.562335, abs=1e-6)
    assert token_expert_information(probs) == pytest.approx(0.562335 - 0.346574, abs=1e-6)


def test_entropies_of_the_fixture():
    probs = LOGITS.softmax(1)
    assert token_entropy(probs) == pytest.approx(0.849702, abs=1e-5)
    assert mean_entropy(probs) == pytest.approx(1.001238, abs=1e-5)
    assert token_expert_information(probs) == pytest.approx(0.151535, abs=1e-5)


@pytest.mark.parametrize("measure", [token_entropy, mean_entropy, token_expert_information])
def test_padding_does_not_count(measure):
    probs = LOGITS.softmax(1)
    padded = torch.cat([probs[:2], torch.full((1, 3), torch.nan), probs[2:]])
    mask = torch.tensor([True, True, False, True, True])
    assert measure(padded, mask) == pytest.approx(measure(probs), abs=1e-12)
    assert measure(probs.bfloat16()) == pytest.approx(measure(probs), abs=1e-2)


def test_tokens_that_are_sure_of_different_experts_tell_everything():
    assert token_expert_information(torch.eye(3)) == pytest.approx(math.log(3))
    assert token_expert_information(torch.full((5, 3), 1 / 3)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("measure", [token_entropy, mean_entropy, token_expert_information])
@pytest.mark.parametrize(
    ("probs", "mask", "message"),
    [
        ([0.5, 0.5], None, r"got shape \(2,\)"),
        ([[0.5, 0.5]], [False], "no real token"),
        ([[0.5, 0.5]], [True, True], r"bool mask of shape \(1,\)"),
        ([[0.5, 0.5]], [1], "is needed, got torch.int64"),
        ([[1.5, -0.5]], None, "non-negative and sum to 1"),
        ([[0.5, 0.4]], None, "non-negative and sum to 1"),
        ([[math.nan, 0.5]], None, "non-negative and sum to 1"),
    ],
)
def test_entropies_refuse(measure, probs, mask, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.tensor(probs), None if mask is None else torch.tensor(mask))
