"""What breaks a growing model on Avalanche 0.6.0, and the test that shows our behaviour; bad input; kinds of streams.

Without a file name the test stands here; ``any_model``, ``plugin``, ... stand for test_any_model.py and so on.

| what breaks (the facts page)        | test                                                                           |
|-------------------------------------|--------------------------------------------------------------------------------|
| grow in before_training_exp         | plugin: optimizer_holds_the_live_tensors_once_and_a_new_expert_moves           |
| adaptation in eval grows the pool   | plugin: eval_changes_nothing_..., any_model: eval_never_changes_any_model      |
| freeze by requires_grad only        | a_frozen_shared_expert_keeps_statistics_and_no_optimizer_state, any_model:     |
|                                     | named_parts_are_frozen_...; classifier: frozen_backbone_keeps_...              |
| freeze by zeroing gradients         | plugin: first_expert_is_bit_identical_after_four_more_tasks (four optimizers)  |
| freeze by leaving it out            | make_optimizer_thaws_nothing                                                   |
| grow one stacked tensor             | shared_tensors_keep_their_moments_when_pools_grow, survivors_of_a_removal_...  |
| one param group per expert          | several_parameter_groups_follow_the_pools, several_groups_beside_frozen_parts; |
|                                     | one stays one: plugin: optimizer_holds_..., any_model: every_pool_grows_once_. |
| prune from a ModuleList             | survivors_of_a_removal_keep_names_and_moments                                  |
| update_optimizer is quadratic       | the_optimizer_holds_few_tensors_however_many_experts                           |
| EWC, MAS, A-GEM, Replay, LwF        | any_model: avalanche_s_plugins_run_over_five_growths                           |
| SI, RWalk, GDumb                    | any_model: plugins_that_break_on_growth_are_refused_with_the_reason            |
| LwF without task labels             | lwf_without_task_labels_is_refused                                             |
| save_checkpoint                     | avalanche_issues: avalanche_s_checkpoint_fails_and_ours_goes_on                |
| plain state_dict into a fresh pool  | a_plain_state_dict_loads_into_a_fresh_model, classifier: load_into_a_fresh_... |
| TensorboardLogger, metrics          | avalanche_s_metrics_and_tensorboard_run_beside_the_pool_s                      |

| bad input                           | test                                                                           |
|-------------------------------------|--------------------------------------------------------------------------------|
| an empty experience                 | an_empty_experience_is_refused_with_nothing_changed                            |
| one sample                          | any_model: one_sample_is_enough_for_an_experience                              |
| a class seen again                  | plugin: classes_seen_again_get_a_new_expert_of_their_own                       |
| another feature size                | any_model: a_stream_whose_feature_size_changes_is_refused_...                  |
| a task label never seen             | a_task_label_never_seen_is_no_matter_to_the_gate_and_an_error_to_a_mask        |
| no MoELayers                        | plugin: other_models_are_refused_before_the_first_step                         |

| works in                            | test                                                                           |
|-------------------------------------|--------------------------------------------------------------------------------|
| class-, domain-, task-incremental,  | the_optimizer_holds_the_live_tensors_after_every_boundary; any_model:          |
| online, any model                   | domain_incremental_stream; online: with_boundaries_..., new_classes_rule_...   |
| with and without task labels or     | avalanche_issues: benchmarks_of_every_make                                     |
| classes_in_this_experience          |                                                                                |
| nested and wrapped modules          | any_model: wrapped_classifier_...; avalanche_issues: nested_..., a_wrapped_... |
| evaluation before the first train   | plugin: eval_changes_nothing_before_the_first_train_and_after                  |
"""

import copy

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, forward_transfer_metrics
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin, SupervisedPlugin
from torch import nn

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, PoolClassifier
from modmoe.continual.metrics import pool_metrics
from modmoe.continual.streams import TaskData, to_benchmark, to_online

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


class Net(nn.Module):
    """A trained backbone, a pool whose layer has a shared expert with BatchNorm, a trained gate, and a head."""

    def __init__(self, num_experts=1, with_shared_expert=True):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, 6)
        shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) if with_shared_expert else None
        pool = modmoe.ExpertPool(modmoe.MLPExpert(6, 5), num_experts)
        self.moe = modmoe.MoELayer(pool, modmoe.DenseRouter(6), shared_expert=shared)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.moe(self.backbone(x).relu()))


def classifier(**options):
    torch.manual_seed(0)
    return PoolClassifier(modmoe.MLPExpert(D, 6, 6), modmoe.GaussianRouter(D), 10, **options)


def listed(strategy):
    return [id(p) for group in strategy.optimizer.param_groups for p in group["params"]]


def live(model):
    return [id(p) for p in model.parameters() if p.requires_grad]


def snapshot(module):
    return copy.deepcopy(module.state_dict())


def same(before, module):
    now = module.state_dict()
    return before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)


class BeforeSteps(SupervisedPlugin):
    """Calls ``look(strategy)`` before the first step of each experience; put it behind ExpertPoolPlugin."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def before_training_exp(self, strategy, *args, **kwargs):
        self.look(strategy)


# -- the optimizer at every boundary ---------------------------------------------------------------------------


def whole(tasks, **options):
    return list(to_benchmark(tasks, **options).train_stream)


STREAMS = {
    "class": lambda blobs: whole(blobs(3)),
    "domain": lambda blobs: whole(blobs(3, same_classes=True)),
    "task": lambda blobs: whole(blobs(3, same_classes=True), task_labels=True),
    "online": lambda blobs: to_online(blobs(3), 10, access_task_boundaries=True),
}


@pytest.mark.parametrize(
    ("make", "stream", "options"),
    [
        *[(make, stream, {}) for make in (classifier, Net) for stream in STREAMS.values()],
        (lambda: classifier(backbone=nn.Linear(D, D), freeze_backbone=False), STREAMS["class"], {}),
        (Net, STREAMS["class"], {"num_experts": 2, "freeze_after_first": ["backbone", "moe.shared_expert"]}),
        (classifier, lambda blobs: to_online(blobs(3), 10), {"growth": NewClasses(min_classes=2)}),
    ],
    ids=[
        *[f"{make}-{stream}" for make in ("classifier", "any-model") for stream in STREAMS],
        "trained-backbone",
        "frozen-parts",
        "task-free",
    ],
)
def test_the_optimizer_holds_the_live_tensors_after_every_boundary(make, stream, options, blobs, strategy_of):
    model = make()

    def look(strategy):
        assert listed(strategy) == live(model)
        assert live(model)

    strategy = strategy_of(model, [ExpertPoolPlugin(**options), BeforeSteps(look)])
    for experience in stream(blobs):
        strategy.train(experience)
        assert listed(strategy) == live(model)
        assert {id(p) for p in strategy.optimizer.state} <= set(live(model))
        assert len(strategy.optimizer.param_groups) == 1
    assert next(iter(modmoe.pools(model).values())).num_experts >= 3


def test_shared_tensors_keep_their_moments_when_pools_grow(blobs, strategy_of):
    model, before = Net(), []

    def moments():
        state = strategy.optimizer.state
        return [state[p][key].clone() for p in model.head.parameters() for key in ("exp_avg", "exp_avg_sq", "step")]

    def look(strategy):
        if model.moe.pool.num_experts > 1:
            assert all(torch.equal(old, new) for old, new in zip(before, moments(), strict=True))
            new = [p for p in model.moe.pool.parameters() if p.requires_grad]
            assert new
            assert not any(strategy.optimizer.state.get(p) for p in new)

    strategy = strategy_of(model, [ExpertPoolPlugin(), BeforeSteps(look)])
    for experience in to_benchmark(blobs(3)).train_stream:
        strategy.train(experience)
        before = moments()
        assert before[2] > 0  # the step of the first tensor: there was something to lose


def test_the_optimizer_holds_few_tensors_however_many_experts(blobs, strategy_of):
    lengths = {}
    for num_experts in (1, 16):
        model, sizes = Net(num_experts), []
        plugins = [ExpertPoolPlugin(num_experts), BeforeSteps(lambda s, sizes=sizes: sizes.append(len(listed(s))))]
        strategy = strategy_of(model, plugins)
        for experience in to_benchmark(blobs(4)).train_stream:
            strategy.train(experience)
        lengths[num_experts] = sizes
        assert model.moe.pool.num_experts == 4 * num_experts
    # Linear 2, shared Linear and BatchNorm 4, head 2; a cohort of any size: two layers with biases 4, gate row and bias
    # 2. The frozen cohorts are gone, so four tasks need no more than one.
    assert lengths == {1: [14] * 4, 16: [14] * 4}


# -- several parameter groups ----------------------------------------------------------------------------------


def grouped(model):
    """Three groups: the backbone, the experts with their gate and shared expert, the head."""
    parts = zip((model.backbone, model.moe, model.head), (0.01, 0.02, 0.03), strict=True)
    return torch.optim.Adam([{"params": list(part.parameters()), "lr": lr} for part, lr in parts])


def group_of(strategy, parameters):
    """The learning rates of the groups that the parameters are in."""
    wanted = {id(p) for p in parameters}
    return {g["lr"] for g in strategy.optimizer.param_groups for p in g["params"] if id(p) in wanted}


@pytest.mark.parametrize("with_shared_expert", [True, False])
def test_several_parameter_groups_follow_the_pools(with_shared_expert, blobs, strategy_of):
    # without a shared expert nothing of the second group is left where all experts are frozen: Avalanche finds no group
    model = Net(with_shared_expert=with_shared_expert)
    seen = []

    def look(strategy):
        assert sorted(listed(strategy)) == sorted(live(model))
        seen.append(group_of(strategy, model.moe.pool.parameters()))
        assert group_of(strategy, model.head.parameters()) == {0.03}

    strategy = strategy_of(model, [ExpertPoolPlugin(), BeforeSteps(look)], optimizer=lambda _: grouped(model))
    for experience in to_benchmark(blobs(4)).train_stream:
        strategy.train(experience)
    assert seen == [{0.02}] * 4
    assert len(strategy.optimizer.param_groups) == 3


def test_several_groups_beside_frozen_parts(blobs, strategy_of):
    model = Net()
    parts = ["backbone", "moe.shared_expert"]

    def look(strategy):
        assert sorted(listed(strategy)) == sorted(live(model))
        assert group_of(strategy, model.moe.pool.parameters()) == {0.02}
        assert group_of(strategy, model.head.parameters()) == {0.03}

    plugins = [ExpertPoolPlugin(freeze_after_first=parts), BeforeSteps(look)]
    strategy = strategy_of(model, plugins, optimizer=lambda _: grouped(model))
    stream = list(to_benchmark(blobs(3)).train_stream)
    strategy.train(stream[0])
    before = [snapshot(model.backbone), snapshot(model.moe.shared_expert)]
    for experience in stream[1:]:
        strategy.train(experience)
        assert sorted(listed(strategy)) == sorted(live(model))
        assert [len(g["params"]) for g in strategy.optimizer.param_groups] == [0, 0, 2]
    assert same(before[0], model.backbone)
    assert same(before[1], model.moe.shared_expert)
    model.moe.shared_expert.requires_grad_(True)
    modmoe.sync_optimizer(strategy.optimizer, model)
    assert group_of(strategy, model.moe.shared_expert.parameters()) == {0.02}  # where they came from


# -- freezing --------------------------------------------------------------------------------------------------


def test_a_frozen_shared_expert_keeps_statistics_and_no_optimizer_state(blobs, strategy_of):
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin(freeze_after_first=["moe.shared_expert"])])
    stream = list(to_benchmark(blobs(3)).train_stream)
    fresh = snapshot(model.moe.shared_expert)
    strategy.train(stream[0])
    assert not torch.equal(fresh["1.running_mean"], model.moe.shared_expert[1].running_mean)
    before = snapshot(model.moe.shared_expert)
    for experience in stream[1:]:
        strategy.train(experience)
    assert same(before, model.moe.shared_expert)
    assert not {id(p) for p in model.moe.shared_expert.parameters()} & {id(p) for p in strategy.optimizer.state}


def test_make_optimizer_thaws_nothing(blobs, strategy_of):
    model, frozen = Net(), []

    def look(strategy):
        if frozen:
            strategy.make_optimizer()  # a plugin or a user may, after ours has put things right
            assert {id(p) for p in model.backbone.parameters()} <= set(listed(strategy))

    sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    plugins = [ExpertPoolPlugin(freeze_after_first=["backbone"]), BeforeSteps(look)]
    strategy = strategy_of(model, plugins, optimizer=sgd)
    stream = list(to_benchmark(blobs(3)).train_stream)
    strategy.train(stream[0])
    frozen += [snapshot(model.backbone), model.moe.pool.expert_state(0)]
    for experience in stream[1:]:
        strategy.train(experience)
        assert listed(strategy) == live(model)
    assert same(frozen[0], model.backbone)
    now = model.moe.pool.expert_state(0)
    assert all(torch.equal(frozen[1][name], now[name]) for name in now)


# -- removal ---------------------------------------------------------------------------------------------------


def moments_of(strategy, layer, expert_id):
    """Adam's first moment of an expert's first layer."""
    for tensor, rows in layer.pool.growable("expert", "w_in").live():
        for index, row in enumerate(rows):
            if row.owner == expert_id:
                return strategy.optimizer.state[tensor]["exp_avg"][index].clone()
    raise AssertionError(f"expert {expert_id} is not live")


def test_survivors_of_a_removal_keep_names_and_moments(blobs, strategy_of):
    model, before = Net(num_experts=3), {}

    def look(strategy):
        if before:
            assert listed(strategy) == live(model)
            assert len(set(listed(strategy))) == len(listed(strategy))
            for expert_id, moment in before.items():
                assert torch.equal(moments_of(strategy, model.moe, expert_id), moment)

    strategy = strategy_of(model, [ExpertPoolPlugin(), BeforeSteps(look)])
    parts = to_online(blobs(2), 8, access_task_boundaries=True)  # three parts a task
    strategy.train(parts[0])
    before |= {i: moments_of(strategy, model.moe, i) for i in (0, 2)}
    assert all(moment.abs().sum() > 0 for moment in before.values())
    modmoe.remove(model, [1])  # and no sync_optimizer: the plugin does it
    strategy.train(parts[1])
    before.clear()
    for part in parts[2:]:
        strategy.train(part)
    assert model.moe.pool.ids == (0, 2, 3)  # ids are not used again
    kept = model.moe.pool.expert_state(2)
    modmoe.remove(model, [0])  # a frozen one
    strategy.train(parts[0])
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.moe.pool.expert_state(2).items())


# -- saving, metrics, refusals -----------------------------------------------------------------------------------


def test_a_plain_state_dict_loads_into_a_fresh_model(blobs, strategy_of):
    tasks, model = blobs(3), Net()
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tasks[0].test_x), fresh.eval()(tasks[0].test_x))
    assert fresh.moe.pool.frozen_ids == (0, 1, 2)


def test_avalanche_s_metrics_and_tensorboard_run_beside_the_pool_s(blobs, strategy_of, tmp_path):
    benchmark = to_benchmark(blobs(2))
    evaluator = EvaluationPlugin(
        *pool_metrics(),
        accuracy_metrics(experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True, stream=True),
        forward_transfer_metrics(experience=True, stream=True),
        loggers=[TensorboardLogger(str(tmp_path))],
    )
    model = classifier()
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=4, eval_every=0, evaluator=evaluator)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    results = {name.split("/")[0]: value for name, value in strategy.eval(benchmark.test_stream).items()}
    assert results["Top1_Acc_Stream"] == results["RoutingAccuracy"] == 1.0
    assert results["StreamForgetting"] == results["StreamBWT"] == 0.0
    # before its task the second one was never right (its classes were nobody's), and as little before the first
    assert results["StreamForwardTransfer"] == 0.0
    assert model.pool.num_experts == 2
    assert any(path.stat().st_size > 1000 for path in tmp_path.rglob("events*"))


def test_lwf_without_task_labels_is_refused(blobs, strategy_of):
    model = Net()
    before = snapshot(model)
    strategy = strategy_of(model, [ExpertPoolPlugin(), LwFPlugin()])
    with pytest.raises(ValueError, match=r"LwFPlugin reads task labels, .* as_taskaware_classification_dataset"):
        strategy.train(to_benchmark(blobs(1)).train_stream[0])
    assert same(before, model)


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [classifier, Net])
@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
def test_an_empty_experience_is_refused_with_nothing_changed(number, make, blobs, strategy_of):
    tasks, model = blobs(2), make()
    data = tasks[number]
    stream = whole(tasks)
    tasks[number] = TaskData(data.train_x[:0], data.train_y[:0], data.test_x, data.test_y)
    empty = whole(tasks)[number]
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    strategy.train(stream[:number])
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"experience {number} is empty"):
        strategy.train(empty)
    assert same(before, model)
    assert number == 0 or listed(strategy) == live(model)  # Avalanche looks at the optimizer for the first time later


@pytest.mark.parametrize("make", [classifier, Net])
def test_a_task_label_never_seen_is_no_matter_to_the_gate_and_an_error_to_a_mask(make, blobs, strategy_of):
    tasks, model = blobs(3), make()
    benchmark = to_benchmark(tasks, task_labels=True)
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    strategy.train(benchmark.train_stream[:2])
    before = snapshot(model)
    strategy.eval(benchmark.test_stream)  # with the third task
    assert same(before, model)
    layer = model.layer if make is classifier else model.moe
    if make is Net:
        layer.pool.assign_task(0, 0)  # an expert without a task would serve any
    x = torch.zeros(2, layer.router.in_features)
    with pytest.raises(ValueError, match=r"no expert belongs to task \[2\], the pool has \[0, 1\]"):
        layer(x, task_ids=torch.tensor([1, 2]))
