"""Baselines that are more than a plugin: progressive networks, and the selection of Expert Gate."""

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.models.pnn import PNN
from torch import Tensor

from modmoe.continual.strategies import make_strategy
from modmoe.continual.streams import TaskData
from modmoe.gating.autoencoder import AutoencoderRouter

UNSEEN = -1  # the prediction for a sample of a task that has not been learned: no class, hence wrong
NUM_LAYERS = 2  # hidden layers; with one, no column of Avalanche's PNN would see what another one has learned


class ProgressiveNetworks:
    """Avalanche's own PNN: a frozen column and a head for each task, read with the task id of each test sample.

    Seed the global generator first. For each experience of ``to_benchmark(tasks, task_labels=True).train_stream``,
    in order: :meth:`train_task`, then :meth:`predict`.

    Args:
        tasks: the stream; only its number of tasks, input size and class ids are looked at, for the size.
        parameters: how many numbers the finished network may have; the columns are made as wide as comes nearest.
        learning_rate: of Adam.
        batch_size: samples in a step.
        epochs: passes over each task.
    Attributes:
        num_parameters: of the finished network.
    Raises:
        ValueError: if parameters < 1 or there is no task.
    Source:
        Rusu et al. 2016, Progressive Neural Networks. Avalanche's differs: its first layer has adapters, too, which
        read copies of the input and hold most of its parameters.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        parameters: float,
        learning_rate: float = 1e-3,
        batch_size: int = 32,
        epochs: int = 1,
    ):
        if parameters < 1 or not tasks:
            raise ValueError(f"parameters and tasks are needed, got {parameters} and {len(tasks)} tasks")
        num_features = tasks[0].train_x[0].numel()
        # a head reaches up to its task's highest class, and Avalanche makes none smaller than 2
        heads = [max(2, max(task.classes) + 1) for task in tasks]
        widths = range(1, 2 + int(parameters) // (len(tasks) * num_features))
        hidden = min(widths, key=lambda width: abs(count_pnn(num_features, width, heads) - parameters))
        self.num_parameters = count_pnn(num_features, hidden, heads)
        model = PNN(NUM_LAYERS, num_features, hidden)
        self._strategy = make_strategy(model, [], learning_rate, batch_size, epochs)

    @property
    def model(self) -> PNN:
        return self._strategy.model

    def train_task(self, experience: Any) -> None:
        """Add a column and a head for a task-labelled experience, and train them."""
        self._strategy.train(experience)

    @torch.no_grad()
    def predict(self, x: Tensor, tasks: Tensor) -> Tensor:
        """The most likely class by the head of each sample's own task.

        Args:
            x: (n, ...).
            tasks: (n,) int64 task ids.
        Returns:
            (n,) int64; ``UNSEEN`` for tasks that have not been learned.
        """
        model = self.model.eval()
        device = next(model.parameters()).device
        predictions = torch.full((len(x),), UNSEEN)
        columns: dict[int, int] = model.layers[0].task_to_module_idx  # type: ignore[assignment]
        for task in columns:
            mine = tasks == task
            # through model.forward the classes above a smaller head would score 0, which can be the highest
            scores = model.forward_single_task(x[mine].to(device), task)
            predictions[mine] = scores.argmax(1).cpu()
        return predictions


def count_pnn(num_features: int, hidden: int, heads: Sequence[int]) -> int:
    """Parameters of Avalanche's PNN with ``NUM_LAYERS`` layers after all tasks.

    A layer with d inputs and H outputs has in column t = 0, 1, ... a linear map d H + H, and from the second column on
    an adapter: V with t d H + H, t scalars, and U with H^2 + H. A head with C classes has C H + C.

    Args:
        num_features: inputs.
        hidden: H.
        heads: the classes of each task's head.
    """
    total = sum(classes * (hidden + 1) for classes in heads)
    for inputs in (num_features, *[hidden] * (NUM_LAYERS - 1)):
        for column in range(len(heads)):
            total += inputs * hidden + hidden
            if column:
                total += column * inputs * hidden + hidden + column + hidden**2 + hidden
    return total


def expert_gate(in_features: int, seed: int = 0) -> AutoencoderRouter:
    """The selection of Expert Gate, for a PoolClassifier: the expert whose autoencoder reconstructs a sample best.

    One undercomplete autoencoder for each expert (a hidden layer of 100 ReLU units, at most D / 2; no noise), trained
    on the expert's task alone.

    Args:
        in_features: D.
        seed: of the autoencoders' training.
    Source:
        Aljundi et al. 2017, Expert Gate. There a softmax of -error / temperature picks the experts to load; the one
        with the lowest error is the same for every temperature. Differences: the features are taken as they are (there
        standardised and put through a sigmoid, so that a sigmoid output with cross-entropy can rebuild them; here
        linear output and squared error); training starts from principal directions; a new expert starts afresh (there
        from the most related one).
    """
    hidden = max(1, min(100, in_features // 2))
    return AutoencoderRouter(in_features, hidden_features=hidden, per_class=False, noise=0.0, seed=seed)
