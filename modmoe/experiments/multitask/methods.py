"""The methods of a multi-task run, all with as many parameters as mmoe."""

from collections.abc import Callable

import torch
from torch import nn

from modmoe.experiments.multitask.settings import Method, MultitaskSettings
from modmoe.experiments.sizes import nearest_size
from modmoe.growth import count_parameters
from modmoe.multitask import PLE, FeatureFront, LayerExpert, MMoE, MultiTaskData, OneGateMoE, SharedBottom, SingleTask
from modmoe.multitask.model import Tasks

ABOUT: dict[Method, str] = {
    "mmoe": "shared experts of one layer, mixed by a gate for each task (MMoE)",
    "ple": "levels of shared experts and experts of each task (PLE)",
    "one_gate": "the experts of MMoE under one gate for all tasks",
    "shared_bottom": "one layer that all tasks share, without gates",
    "single_task": "a network for each task, {size} as large as MMoE",
}


def build(method: Method, settings: MultitaskSettings, data: MultiTaskData, seed: int) -> nn.Module:
    """A fresh model of a method; its size is the one that comes nearest to mmoe's number of parameters."""
    make = maker(method, settings, data)
    size = settings.expert_features
    if method != "mmoe":
        target = count_parameters(maker("mmoe", settings, data)(size)).total
        if method == "single_task" and settings.single_task_size == "each":
            target *= len(data.tasks)
        size = nearest_size(make, target)
    torch.manual_seed(seed)
    return make(size)


def maker(method: Method, settings: MultitaskSettings, data: MultiTaskData) -> Callable[[int], nn.Module]:
    """Size of an expert or of a bottom -> a fresh model."""
    tasks, experts, tower = data.tasks, settings.num_experts, settings.tower_features

    def front() -> FeatureFront:
        return FeatureFront(data.num_dense, data.cardinalities, settings.embedding_features)

    def bottom(size: int, tasks: Tasks) -> SharedBottom:
        return SharedBottom(front(), tasks, size, tower)

    def layer(size: int) -> LayerExpert:
        return LayerExpert(front().out_features, size)

    own = max(1, experts // 2 // len(tasks))
    makers: dict[Method, Callable[[int], nn.Module]] = {
        "mmoe": lambda size: MMoE(front(), tasks, layer(size), experts, tower),
        "one_gate": lambda size: OneGateMoE(front(), tasks, layer(size), experts, tower),
        "ple": lambda size: PLE(
            front(),
            tasks,
            lambda in_features: LayerExpert(in_features, size),
            max(1, experts - own * len(tasks)),
            own,
            settings.ple_levels,
            tower,
        ),
        "shared_bottom": lambda size: bottom(size, tasks),
        "single_task": lambda size: SingleTask(lambda task: bottom(size, task), tasks),
    }
    return makers[method]
