import pytest
import torch

from modmoe.analysis.usage import coefficient_of_variation, dead_experts, load, max_violation

COUNTS = torch.tensor([6, 1, 1, 0])


def test_load_counts_assignments_and_leaves_out_dropped_ones():
    expert_index = torch.tensor([[0, 2], [-1, 2], [3, 0]])
    assert load(expert_index, 5).tolist() == [2, 0, 2, 1, 0]
    assert load(torch.tensor([-1, -1]), 2).tolist() == [0, 0]
    assert load(torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("expert_index", "message"),
    [
        (torch.tensor([0, 3]), r"\[-1, 3\), got 0 to 3"),
        (torch.tensor([-2, 0]), r"\[-1, 3\), got -2 to 0"),
        (torch.tensor([0.0]), "must be integers"),
    ],
)
def test_load_refuses(expert_index, message):
    with pytest.raises(ValueError, match=message):
        load(expert_index, 3)


def test_coefficient_of_variation():
    # mean 8 / 4 = 2; variance (16 + 1 + 1 + 4) / 4 = 5.5; sqrt(5.5) / 2 = 1.172604
    assert coefficient_of_variation(COUNTS) == pytest.approx(1.172604, abs=1e-6)
    assert coefficient_of_variation(torch.tensor([3, 3])) == 0.0
    assert coefficient_of_variation(torch.tensor([5])) == 0.0


def test_max_violation():
    # 6 / 2 - 1 = 2
    assert max_violation(COUNTS) == pytest.approx(2.0)
    assert max_violation(torch.tensor([3, 3])) == 0.0


def test_dead_experts():
    assert dead_experts(COUNTS) == [3]
    assert dead_experts(torch.tensor([0, 2, 0])) == [0, 2]
    assert dead_experts(torch.tensor([1])) == []


@pytest.mark.parametrize("measure", [coefficient_of_variation, max_violation, dead_experts])
@pytest.mark.parametrize(
    ("counts", "message"),
    [([[1, 2]], r"got shape \(1, 2\)"), ([], "non-empty"), ([2, -1], "negative"), ([0, 0], "sums to 0")],
)
def test_bad_counts_are_refused(measure, counts, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.tensor(counts))
