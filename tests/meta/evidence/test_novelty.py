import pytest
import torch
from scipy.stats import binom

from modmoe.meta import TaskBatch
from modmoe.meta.evidence import NoveltyTest, calibrate_novelty


def test_thresholds_between_and_beyond_sizes_by_hand():
    # -2 at 2 and -6 at 4: slope -2 between and beyond, -1 a point below 2
    test = NoveltyTest((2, 4), (-2.0, -6.0), 0.05)
    got = test.threshold(torch.tensor([0, 1, 2, 3, 4, 6]))
    assert got.tolist() == [0.0, -1.0, -2.0, -4.0, -6.0, -10.0]


def test_the_quantile_of_known_tasks_is_called_novel(mixture_of, tasks_of):
    model = mixture_of(2)
    full = tasks_of(400, 6)
    test = calibrate_novelty(model, [full[:150], full[150:], tasks_of(400, 3)], quantile=0.1)
    assert test.sizes == (3, 6)
    assert test.is_novel(model, full).float().mean().item() == pytest.approx(0.1, abs=0.005)
    # masked contexts of three points are compared with contexts of three points
    mask = torch.arange(6).expand(400, 6) < 3
    masked = TaskBatch(full.context_x, full.context_y, full.target_x, None, mask)
    short = TaskBatch(full.context_x[:, :3], full.context_y[:, :3], full.target_x)
    assert torch.equal(test.is_novel(model, masked), test.is_novel(model, short))


def test_many_novel_tasks_are_a_new_family(mixture_of, tasks_of):
    model, tasks = mixture_of(2), tasks_of(20, 4)
    evidence = model.log_evidence(tasks)
    for count in range(8):
        # the threshold between two tasks: just so many are below it
        ordered = evidence.sort().values.tolist()
        between = ordered[0] - 1 if count == 0 else (ordered[count - 1] + ordered[count]) / 2
        test = NoveltyTest((4,), (between,), 0.05)
        assert int(test.is_novel(model, tasks).sum()) == count
        assert test.nobody_explains(model, tasks) == (binom.sf(count - 1, 20, 0.05) < 1e-3)
    empty = TaskBatch(tasks.context_x[:, :0], tasks.context_y[:, :0], tasks.target_x)
    assert not test.is_novel(model, empty).any()
    assert not test.nobody_explains(model, empty)


def test_only_the_experts_asked_for_count(mixture_of, tasks_of):
    model, tasks = mixture_of(2), tasks_of(50, 4)
    alone = calibrate_novelty(model, [tasks], 0.1, experts=[0])
    evidence = model.log_evidence(tasks, [0])
    assert alone.thresholds[0] == pytest.approx(evidence.quantile(0.1).item())
    assert torch.equal(alone.is_novel(model, tasks, [0]), evidence < alone.thresholds[0])


def test_bad_input(mixture_of, tasks_of):
    model = mixture_of(1)
    with pytest.raises(ValueError, match=r"quantile must lie in \(0, 1\), got 0"):
        calibrate_novelty(model, [tasks_of()], 0.0)
    with pytest.raises(ValueError, match=r"needs 20 tasks of each context size, got \{5: 3\}"):
        calibrate_novelty(model, [tasks_of()])
    with pytest.raises(ValueError, match="needs 20 tasks"):
        calibrate_novelty(model, [])
