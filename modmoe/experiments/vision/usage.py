"""Which experts the images of each class use."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modmoe.analysis import Matrix
from modmoe.experiments.vision.data import batches
from modmoe.experiments.vision.training import Training, in_order
from modmoe.vision import moe_layers


@torch.no_grad()
def class_usage(training: Training, dataset: Dataset, class_names: list[str]) -> dict[str, Matrix]:
    """The share of each expert in the weights of a class's tokens, for each layer; rows add up to 1.

    Args:
        training: its averaged model is asked, in evaluation.
        dataset: with its images.
        class_names: rows, in order.
    Returns:
        "experts of each class, <layer>" -> Matrix (classes, experts); none without experts. A class without images
        has a row of NaN.
    """
    model = training.tested.eval()
    layers = moe_layers(model)
    totals: dict[str, Tensor] = {}
    order = in_order(dataset, training.settings.batch_size) if layers else []
    for x, y in batches(dataset, order, training.settings.workers):
        with training.autocast():
            model(x.to(training.device))
        for name, layer in layers.items():
            assert layer.routing is not None
            weights = layer.routing.matrix().double().cpu().unflatten(0, (len(y), -1)).sum(1)  # (B, E)
            total = totals.setdefault(name, weights.new_zeros(len(class_names), weights.shape[1]))
            total.index_add_(0, y, weights)
    return {
        f"experts of each class, {name}": Matrix(
            (total / total.sum(1, keepdim=True)).numpy(),
            "class",
            "expert",
            class_names,
            [str(expert_id) for expert_id in layers[name].pool.ids],
        )
        for name, total in totals.items()
    }
