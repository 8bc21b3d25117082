"""Fine-grained segmentation: experts cut into experts that add up to them."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import (
    ConvExpert,
    DenseRouter,
    ExpertPool,
    MLPExpert,
    MoELayer,
    SwiGLUExpert,
    TopKRouter,
    count_parameters,
    segment_pool,
    segmented,
)
from modmoe.kernels.reference import LoopOps

KINDS = [MLPExpert(3, 6, 2, activation="tanh"), SwiGLUExpert(3, 6, 2), SwiGLUExpert(3, 6, 2, bias=True)]


def rows(pool: ExpertPool, expert_id: int) -> dict:
    return {name.removeprefix("expert."): row[0] for name, row in pool.expert_state(expert_id).items()}


def test_by_hand():
    pool = ExpertPool(MLPExpert(1, 2, activation="relu"), 1)
    with torch.no_grad():
        for name, values in {"w_in": [1.0, -1.0], "b_in": [0.0, 1.0], "w_out": [2.0, 3.0], "b_out": [8.0]}.items():
            bank = pool.growable("expert", name).banks()[0][0]
            bank.copy_(torch.tensor(values).view(bank.shape))
    first, second = (
        {name: value.flatten().tolist() for name, value in rows(fine, i).items()}
        for fine in [segment_pool(pool, 2)]
        for i in fine.ids
    )
    assert first == {"w_in": [1.0], "b_in": [0.0], "w_out": [2.0], "b_out": [4.0]}
    assert second == {"w_in": [-1.0], "b_in": [1.0], "w_out": [3.0], "b_out": [4.0]}


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("num_segments", [1, 2, 3])
def test_the_segments_add_up_to_the_expert(kind, num_segments):
    torch.manual_seed(0)
    pool = ExpertPool(kind, 2, task="a").double()
    pool.add_experts(1, task="b", hidden_features=12)
    pool.freeze([1])
    pool.remove([0])
    before = {name: tensor.clone() for name, tensor in pool.state_dict().items()}
    fine = segment_pool(pool, num_segments)
    assert fine.num_experts == 2 * num_segments
    assert fine.tasks() == ("a",) * num_segments + ("b",) * num_segments
    assert fine.frozen_ids == fine.ids[:num_segments]
    x = torch.randn(5, 3, dtype=torch.float64)
    for position, expert_id in enumerate(pool.ids):
        parts = fine.ids[position * num_segments : (position + 1) * num_segments]
        together = sum(fine.expert.compute(x, LoopOps(rows(fine, part))) for part in parts)
        assert_close(together, kind.compute(x, LoopOps(rows(pool, expert_id))), atol=1e-12, rtol=1e-12)
        width = pool.record(expert_id).sizes["hidden_features"] // num_segments
        assert all(fine.record(part).sizes == {"hidden_features": width} for part in parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.state_dict().items())
    # later experts have the size of the segmented kind
    (added,) = fine.add_experts(1)
    assert fine.record(added).sizes == {"hidden_features": 6 // num_segments}


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_with_repeated_gate_rows_a_scaled_pool_keeps_the_layer_s_function(kind):
    torch.manual_seed(0)
    coarse = MoELayer(ExpertPool(kind, 4), TopKRouter(3, 2))
    fine = MoELayer(segment_pool(coarse.pool, 3, scale=3.0), TopKRouter(3, 6))
    gate = coarse.pool.growable("gate", "weight").stack(coarse.pool.ids)
    with torch.no_grad():
        for tensor, owners, _ in fine.pool.growable("gate", "weight").banks():
            for index, row in enumerate(owners):
                tensor[index] = gate[fine.pool.ids.index(row.owner) // 3]
    x = torch.randn(20, 3)
    assert_close(fine(x), coarse(x), atol=1e-5, rtol=1e-5)


def test_parameters_and_active_parameters_stay():
    coarse = MoELayer(ExpertPool(SwiGLUExpert(4, 12), 4), TopKRouter(4, 1))
    fine = MoELayer(ExpertPool(segmented(SwiGLUExpert(4, 12), 3), 12), TopKRouter(4, 3))
    before, after = count_parameters(coarse), count_parameters(fine)
    gate_rows = (12 - 4) * 4
    assert after.total == before.total + gate_rows
    assert after.active == before.active + gate_rows


def test_segmented_is_a_new_description():
    kind = MLPExpert(4, 12, 5, activation="relu")
    fine = segmented(kind, 4)
    assert (fine.in_features, fine.hidden_features, fine.out_features, fine.activation) == (4, 3, 5, "relu")
    assert kind.hidden_features == 12


def test_gates_are_left_to_the_new_layer():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(SwiGLUExpert(3, 6), 2), DenseRouter(3)).double()
    fine = segment_pool(layer.pool, 2)
    assert fine.namespaces == ("expert",)
    assert MoELayer(fine, DenseRouter(3))(torch.randn(4, 3).double()).dtype == torch.float64


def test_refusals():
    with pytest.raises(ValueError, match="num_segments must divide the hidden size 12, got 5"):
        segmented(MLPExpert(4, 12), 5)
    with pytest.raises(ValueError, match="num_segments must divide the hidden size 12, got 0"):
        segmented(MLPExpert(4, 12), 0)
    with pytest.raises(ValueError, match="can be segmented, got ConvExpert"):
        segmented(ConvExpert((1, 4, 4), (2,)), 2)
    pool = ExpertPool(MLPExpert(4, 12), 1)
    pool.add_experts(1, hidden_features=7)
    with pytest.raises(ValueError, match="must divide the hidden size 7, got 2"):
        segment_pool(pool, 2)
