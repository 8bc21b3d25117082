"""How much each task's gate uses each expert."""

import torch
from torch import Tensor, nn

from modmoe.analysis import Matrix
from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.gates import GatedLevel
from modmoe.multitask.mixtures import OneGateMoE
from modmoe.pool import ExpertPool


@torch.no_grad()
def gate_usage(model: nn.Module, data: MultiTaskData, limit: int = 8192) -> dict[str, Matrix]:
    """The mean weight of each expert in each gate over the first samples; rows add up to 1.

    Args:
        model: an MMoE, PLE or OneGateMoE; others have no gates.
        data: samples.
        limit: how many are used at most.
    Returns:
        Title -> Matrix (gates, experts): "gate usage", with the level where there are several; empty without gates. An
        expert's name is its id, with its task if it belongs to one.
    """
    was_training = model.training
    model.eval()
    model(*data.inputs(slice(0, limit)))
    model.train(was_training)
    if isinstance(model, OneGateMoE):
        routing = model.layer.routing
        assert routing is not None
        return {"gate usage": _matrix(model.pool, {"all tasks": routing.matrix()})}
    levels = [module for module in model.modules() if isinstance(module, GatedLevel)]
    titles = ["gate usage"] if len(levels) == 1 else [f"gate usage, level {i}" for i in range(len(levels))]
    return {
        title: _matrix(level.pool, {name: level.gate_weights(name) for name in level.gates})
        for title, level in zip(titles, levels, strict=True)
    }


def _matrix(pool: ExpertPool, weights: dict[str, Tensor]) -> Matrix:
    tasks = [pool.record(expert_id).task for expert_id in pool.ids]
    names = [str(i) if task is None else f"{i} ({task})" for i, task in zip(pool.ids, tasks, strict=True)]
    values = torch.stack([weight.mean(0) for weight in weights.values()])
    return Matrix(values.cpu().numpy(), "gate", "expert", list(weights), names)
