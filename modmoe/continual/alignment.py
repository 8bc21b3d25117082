"""Keep in step with a growing model what Avalanche and its plugins keep of its parameters."""

import torch
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData
from torch import nn
from torch.optim import Optimizer

from modmoe.optim import HOME, sync_optimizer


def list_all_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Put every parameter into the optimizer, each in its group: the new ones, and the frozen ones for the moment.

    Avalanche's ``make_optimizer``, which comes next, lists them all anyway. Of a parameter that is not listed it
    guesses the group by the names around it: with several groups that fails where all of a pool's experts are frozen
    or a whole submodule is. A frozen parameter goes back to where it was, one that never was in a group to the first.
    ``sync_optimizer`` takes the frozen ones out again before the first step.
    """
    sync_optimizer(optimizer, model)
    listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    home = {name: group for group in optimizer.param_groups for name in group.get(HOME, ())}
    for name, parameter in model.named_parameters():
        if id(parameter) not in listed:
            group = home.get(name, optimizer.param_groups[0])
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)


@torch.no_grad()
def align_importances(plugin: EWCPlugin, model: nn.Module) -> None:
    """Give online EWC's importances the model's present names: it walks both in step, and fails where they differ.

    A retired tensor's importance is dropped with it; a new tensor starts with none.
    """
    for experience, old in plugin.importances.items():
        plugin.importances[experience] = {
            name: old[name] if name in old else ParamData(name, parameter.shape, device=parameter.device)
            for name, parameter in model.named_parameters()
        }
