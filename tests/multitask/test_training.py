"""Training, scores and the gates' use."""

import math

import numpy as np
import pytest
import torch

from modmoe.multitask import (
    FeatureFront,
    LayerExpert,
    MMoE,
    MultiTaskData,
    OneGateMoE,
    SharedBottom,
    SingleTask,
    UncertaintyWeighting,
    area_under_curve,
    fit,
    gate_usage,
    mean_squared_error,
    predict,
    synthetic_tasks,
)

TASKS = {"sum": "regression", "above": "binary"}


def table(n=600, seed=0, missing=0.0):
    """The first feature plus what a category stands for, and whether that is positive."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, 2, generator=generator)
    categorical = torch.randint(0, 3, (n, 1), generator=generator)
    value = dense[:, 0] + torch.tensor([-2.0, 0.0, 2.0])[categorical[:, 0]]
    targets = {"sum": value, "above": (value > 0).float()}
    for name, target in targets.items():
        targets[name] = target.masked_fill(torch.rand(n, generator=generator) < missing, math.nan)
    return MultiTaskData(dense, categorical, targets, TASKS, (3,))


def test_area_under_curve_by_hand():
    # pairs (positive, negative): (3, 1) 1, (3, 2) 1, (2, 1) 1, (2, 2) a tie 1/2
    scores, targets = torch.tensor([3.0, 2.0, 1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 0.0, math.nan])
    assert area_under_curve(scores, targets) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="both classes, got 2 positives and 0 negatives"):
        area_under_curve(scores[:2], targets[:2])


def test_mean_squared_error_by_hand():
    assert mean_squared_error(torch.tensor([1.0, 5.0]), torch.tensor([3.0, math.nan])) == 4.0
    with pytest.raises(ValueError, match="no sample has a label"):
        mean_squared_error(torch.zeros(1), torch.tensor([math.nan]))


@pytest.mark.parametrize("balance", [None, "uncertainty"])
def test_mixed_tasks_with_missing_labels_are_learned(balance):
    torch.manual_seed(0)
    model = MMoE(FeatureFront(2, [3], 4), TASKS, LayerExpert(6, 8), 3)
    data, test = table(missing=0.5), table(seed=1)
    fit(model, data, 12, 64, 0.02, UncertaintyWeighting(TASKS) if balance else None)
    outputs = predict(model, test)
    assert mean_squared_error(outputs["sum"], test.targets["sum"]) < 0.2  # of 3.7
    assert area_under_curve(outputs["above"], test.targets["above"]) > 0.97


def test_the_synthetic_tasks_are_learned():
    train, test = synthetic_tasks(0.5, [3000, 500], num_features=5)
    torch.manual_seed(0)
    model = MMoE(FeatureFront(5), train.tasks, LayerExpert(5, 8), 4)
    fit(model, train, 5, 64, 0.02)
    outputs = predict(model, test)
    for name in train.tasks:
        assert mean_squared_error(outputs[name], test.targets[name]) < 0.1 * test.targets[name].var()


def test_seeded_runs_are_equal_and_a_lone_batch_without_labels_is_passed_over():
    data = table(n=40)
    for name in TASKS:
        data.targets[name][1:] = math.nan  # all batches but one
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = MMoE(FeatureFront(2, [3], 4), TASKS, LayerExpert(6, 8), 2)
        fit(model, data, 1, 4, seed=seed)
        results.append(predict(model, data)["sum"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].isfinite().all()


def test_an_optimizer_is_continued_over_growth():
    data = table(n=64)
    model = MMoE(FeatureFront(2, [3], 4), TASKS, LayerExpert(6, 8), 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    fit(model, data, 1, 32, optimizer=optimizer)
    model.add_experts(1, task="sum")
    fit(model, data, 1, 32, optimizer=optimizer)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {2, 4}  # the new expert's rows, and all others
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_single_task_models_share_nothing():
    data = table(n=64)
    model = SingleTask(lambda tasks: SharedBottom(FeatureFront(2, [3], 4), tasks, 8), TASKS)
    model(*data.inputs(slice(0, 8)))["sum"].sum().backward()
    assert all(p.grad is None for p in model.models["above"].parameters())
    assert all(p.grad is not None for p in model.models["sum"].parameters())
    with pytest.raises(ValueError, match="at least one task"):
        SingleTask(lambda tasks: SharedBottom(FeatureFront(2), tasks, 8), {})


def test_gate_usage_by_hand(set_rows):
    data = table(n=10)
    model = MMoE(FeatureFront(2, [3], 4), TASKS, LayerExpert(6, 8), 2)
    model.add_experts(1, task="above")
    for name in TASKS:
        set_rows(model.pool, f"gate_{name}", "weight", np.zeros((3, 6), np.float32))
        set_rows(model.pool, f"gate_{name}", "bias", [math.log(3), 0.0, 0.0])
    (usage,) = gate_usage(model, data).values()
    # of experts 0 and 1 and, for "above" only, its own: weights 3 : 1 and 3 : 1 : 1
    np.testing.assert_allclose(usage.values, [[0.75, 0.25, 0.0], [0.6, 0.2, 0.2]], rtol=1e-5)
    assert usage.row_names == ["sum", "above"]
    assert usage.column_names == ["0", "1", "2 (above)"]


def test_gate_usage_of_every_kind(ple_of):
    (data,) = synthetic_tasks(0.0, [10], num_features=4)
    data = MultiTaskData(data.dense, None, dict(zip("ab", data.targets.values(), strict=True)), ple_of().tasks)
    usage = gate_usage(ple_of(), data)
    assert list(usage) == ["gate usage, level 0", "gate usage, level 1"]
    assert usage["gate usage, level 0"].row_names == ["shared", "a", "b"]
    for matrix in usage.values():
        np.testing.assert_allclose(matrix.values.sum(1), 1, rtol=1e-5)
    one = gate_usage(OneGateMoE(FeatureFront(4), data.tasks, LayerExpert(4, 5), 2), data)
    assert one["gate usage"].values.shape == (1, 2)
    assert gate_usage(SharedBottom(FeatureFront(4), data.tasks, 5), data) == {}
