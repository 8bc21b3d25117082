"""MLPExpert: act(x W_in + b_in) W_out + b_out."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modmoe import DenseRouter, ExpertPool, MLPExpert, MoELayer
from modmoe.kernels.reference import LoopOps


def test_by_hand():
    expert = MLPExpert(2, 2, 1, activation="relu")
    rows = {
        "w_in": torch.tensor([[1.0, -1.0], [2.0, 0.5]]),
        "b_in": torch.tensor([0.5, 0.0]),
        "w_out": torch.tensor([[3.0], [4.0]]),
        "b_out": torch.tensor([-1.0]),
    }
    # x = (1, 2): hidden = relu(1 + 4 + .5, -1 + 1 + 0) = (5.5, 0); y = 3 * 5.5 + 0 - 1 = 15.5
    # x = (-1, 4): hidden = relu(-1 + 8 + .5, 1 + 2) = (7.5, 3); y = 22.5 + 12 - 1 = 33.5
    y = expert.compute(torch.tensor([[1.0, 2.0], [-1.0, 4.0]]), LoopOps(rows))
    assert y.tolist() == [[15.5], [33.5]]


@pytest.mark.parametrize(
    ("name", "function"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_activations(name, function):
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(3, 5, 2, activation=name), 1)
    w_in, b_in, w_out, b_out = (pool.growable("expert", n).stack([0])[0] for n in ("w_in", "b_in", "w_out", "b_out"))
    x = torch.randn(7, 3)
    y = MoELayer(pool, DenseRouter(3), backend="reference")(x)
    assert_close(y, function(x @ w_in + b_in) @ w_out + b_out, atol=1e-6, rtol=1e-6)


def test_rows_are_drawn_like_linear_layers():
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(16, 64, 4), 20)
    # uniform in +-1/sqrt(fan_in), fan_in 16 and 64: its standard deviation is the bound / sqrt(3)
    for name, bound in (("w_in", 1 / 4), ("b_in", 1 / 4), ("w_out", 1 / 8), ("b_out", 1 / 8)):
        values = pool.growable("expert", name).stack(pool.ids)
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.9 * bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    states = [pool.expert_state(i)["expert.w_in"] for i in (0, 1)]
    assert not torch.equal(*states)  # no two experts start alike


def test_a_cohort_of_another_hidden_size_is_drawn_with_its_own_fan_in():
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(4, 4), 1)
    pool.add_experts(1, hidden_features=400)
    w_out = pool.expert_state(1)["expert.w_out"]
    assert w_out.shape == (1, 400, 4)
    assert 0.9 / 20 < w_out.abs().max() <= 1 / 20


def test_the_output_has_the_size_of_the_input_unless_told():
    assert MLPExpert(3, 5).out_features == 3
    assert MLPExpert(3, 5, 2).out_features == 2
    assert repr(MLPExpert(3, 5, 2)) == "MLPExpert(3, 5, 2)"


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (-1, 4, 4)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="every size of an expert must be at least 1"):
        MLPExpert(*sizes)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'swish', choose one of"):
        MLPExpert(4, 4, activation="swish")
