"""LoRAExpert: alpha / r * x A B (the layer around it: tests/test_lora.py)."""

import pytest
import torch

from modmoe import ExpertPool, LoRAExpert
from modmoe.kernels.reference import LoopOps


def test_by_hand():
    rows = {"a": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "b": torch.tensor([[1.0, 0.0, 1.0], [0.0, -1.0, 1.0]])}
    # x = (1, 3): x A = (1, 2 + 3) = (1, 5); times B: (1, -5, 6); alpha / r = 3 / 2
    y = LoRAExpert(2, 3, rank=2, alpha=3.0).compute(torch.tensor([[1.0, 3.0]]), LoopOps(rows))
    assert y.tolist() == [[1.5, -7.5, 9.0]]
    # another cohort's rank counts, not the description's: 3 / 2 again
    y = LoRAExpert(2, 3, rank=7, alpha=3.0).compute(torch.tensor([[1.0, 3.0]]), LoopOps(rows))
    assert y.tolist() == [[1.5, -7.5, 9.0]]
    # without alpha the scale is 1
    y = LoRAExpert(2, 3, rank=2).compute(torch.tensor([[1.0, 3.0]]), LoopOps(rows))
    assert y.tolist() == [[1.0, -5.0, 6.0]]


def test_new_experts_have_a_random_a_and_a_zero_b():
    torch.manual_seed(0)
    pool = ExpertPool(LoRAExpert(16, 3, rank=4), 2)
    pool.add_experts(1, rank=9)
    assert pool.expert_state(2)["expert.a"].shape == (1, 16, 9)
    for expert_id in pool.ids:
        state = pool.expert_state(expert_id)
        assert 0.8 / 4 < state["expert.a"].abs().max() <= 1 / 4  # 1 / sqrt(16)
        assert (state["expert.b"] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 3, 0), (3, 3, 2, 0.0), (3, 3, 2, -1.0)])
def test_refusals(sizes):
    with pytest.raises(ValueError, match="at least 1 and alpha positive"):
        LoRAExpert(*sizes)
