"""The recipe: AdamW under a cosine with warm-up, averaged weights, autocast, checkpoints, several processes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from modmoe.analysis import usage_metrics
from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.errors import CheckpointError
from modmoe.experiments.vision import parallel
from modmoe.experiments.vision.data import ImageData, batches, training_order
from modmoe.experiments.vision.settings import VisionSettings
from modmoe.vision import moe_layers

# settings that a run may change when it goes on from a checkpoint
FREE = ("checkpoints", "methods", "root", "workers")


class Training:
    """One model and its way through the epochs; a checkpoint holds all of it.

    Each epoch starts from a random state of its own, (seed, epoch, process), so that a run that was interrupted goes
    on as if it had not been.

    Args:
        model: to train.
        data: what on.
        settings: the recipe.
        seed: of order, augmentation and routing noise.
        path: of the checkpoint, or None.
    Raises:
        CheckpointError: if there is a checkpoint of other settings, or a damaged one.
    """

    def __init__(
        self, model: nn.Module, data: ImageData, settings: VisionSettings, seed: int, path: Path | None = None
    ):
        self.device = parallel.start()
        self.data, self.settings, self.seed, self.path = data, settings, seed, path
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.epoch = 0
        self.seconds = 0.0
        self.series: dict[str, list[float]] = {"loss": [], "accuracy": []}
        if path is not None and path.is_file():
            self._resume(path)

    @property
    def tested(self) -> nn.Module:
        """The model with the averaged weights."""
        return self.average.module

    def run(self, progress: Callable[[str], None]) -> None:
        """Train the epochs that are left; after each one test, and write the checkpoint.

        Args:
            progress: takes a short text after each epoch.
        """
        trained = parallel.wrap(self.model, self.device)
        size = len(self.data.train)  # type: ignore[arg-type]
        steps = max(1, size // self.settings.batch_size)
        while self.epoch < self.settings.epochs:
            start = time.perf_counter()
            torch.manual_seed(hash((self.seed, self.epoch, parallel.rank())))
            order = training_order(
                size, self.settings.batch_size, self.seed * 10_007 + self.epoch, parallel.rank(), parallel.num_ranks()
            )
            trained.train()
            losses = []
            for number, (x, y) in enumerate(batches(self.data.train, order, self.settings.workers)):
                self._set_learning_rate(self.epoch * steps + number, steps)
                losses.append(self._step(trained, x.to(self.device), y.to(self.device)))
            self.seconds += time.perf_counter() - start
            self.epoch += 1
            self.series["loss"].append(float(torch.stack(losses).mean()))
            self.series["accuracy"].append(self.accuracy(self.data.test))
            for name, number in training_usage(self.model).items():
                self.series.setdefault(name, []).append(number)
            if self.path is not None:
                self._save(self.path)
            progress(f"epoch {self.epoch}")

    def _step(self, trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(trained(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def _set_learning_rate(self, step: int, steps: int) -> None:
        factor = cosine_with_warmup(step, self.settings.epochs * steps, self.settings.warmup_epochs * steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16, where the settings say so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @torch.no_grad()
    def accuracy(self, dataset: Dataset) -> float:
        """Share of right answers of the averaged weights; each process tests all images."""
        self.tested.eval()
        right = num = 0
        for x, y in batches(dataset, in_order(dataset, self.settings.batch_size), self.settings.workers):
            with self.autocast():
                found = self.tested(x.to(self.device)).argmax(1).cpu()
            right, num = right + int((found == y).sum()), num + len(y)
        return right / num

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _about(self) -> dict:
        return {"seed": self.seed, **{key: v for key, v in asdict(self.settings).items() if key not in FREE}}

    def _save(self, path: Path) -> None:
        if parallel.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            extra = {
                "about": self._about(),
                "epoch": self.epoch,
                "seconds": self.seconds,
                "series": self.series,
                "average": self.average.state_dict(),
            }
            save_checkpoint(path, self.model, self.optimizer, extra)
        parallel.wait()

    def _resume(self, path: Path) -> None:
        extra = load_checkpoint(path, self.model, self.optimizer, rng=False)
        about = self._about()
        changed = sorted(key for key in about if extra["about"].get(key) != about[key])
        if changed:
            raise CheckpointError(f"{path} is of a run with other settings ({', '.join(changed)}): remove it")
        self.average.load_state_dict(extra["average"])
        self.epoch, self.seconds, self.series = extra["epoch"], extra["seconds"], extra["series"]


def cosine_with_warmup(step: int, num_steps: int, warmup_steps: int) -> float:
    """The factor of the learning rate: (step + 1) / warmup, then (1 + cos(pi t)) / 2 with t from 0 to 1.

    Args:
        step: from 0 to num_steps - 1.
        num_steps: in all.
        warmup_steps: of these, below num_steps; 0 for none.
    Source:
        Loshchilov and Hutter 2017 (SGDR), without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps))) / 2


def training_usage(model: nn.Module) -> dict[str, float]:
    """``load_cv`` and ``dropped_fraction`` of each layer in its last call, by "<metric>/<layer>"."""
    found = {}
    for name, layer in moe_layers(model).items():
        assert layer.routing is not None
        metrics = usage_metrics(layer.routing)
        found |= {f"{metric}/{name}": metrics[metric] for metric in ("load_cv", "dropped_fraction")}
    return found


def in_order(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """All places in order, in batches."""
    size = len(dataset)  # type: ignore[arg-type]
    return [list(range(start, min(start + batch_size, size))) for start in range(0, size, batch_size)]
