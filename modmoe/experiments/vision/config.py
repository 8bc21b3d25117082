"""An image-classification run: every method on the same images, with one seed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modmoe.analysis import MethodRecord
from modmoe.experiments.vision.data import ImageData, load_data
from modmoe.experiments.vision.methods import ABOUT, build
from modmoe.experiments.vision.settings import Method, VisionSettings
from modmoe.experiments.vision.training import Training
from modmoe.experiments.vision.usage import class_usage
from modmoe.growth import count_parameters
from modmoe.vision import active_flops


@dataclass
class VisionConfig(VisionSettings):
    """A dense ViT, V-MoE and Soft MoE whose matrix products for one image cost the same, under one recipe."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        progress("data")
        data = load_data(self, seed)
        for method in self.methods:  # what cannot be built is told before the first is trained
            build(method, self, data)
        return {method: self.run_method(method, data, seed, progress) for method in self.methods}

    def run_method(self, method: Method, data: ImageData, seed: int, progress: Callable[[str], None]) -> MethodRecord:
        """Train one method, or go on from its checkpoint, and test it."""
        torch.manual_seed(seed)
        model = build(method, self, data)
        path = None if self.checkpoints is None else Path(self.checkpoints) / f"{method}-seed{seed}.safetensors"
        training = Training(model, data, self, seed, path)
        training.run(lambda text: progress(f"{method}, {text}"))
        count = count_parameters(model)
        metrics = {
            "accuracy": training.series["accuracy"][-1],
            "train_seconds": training.seconds,
            "parameters": float(count.total),
            "active_parameters": float(count.active),
            "active_flops": float(active_flops(model)),
        }
        return MethodRecord(
            metrics,
            matrices=class_usage(training, data.test, data.class_names),
            series=training.series,
            about=ABOUT[method].format(
                num_experts=self.num_experts, blocks=self.blocks, top_k=self.top_k, slots=self.slots
            ),
        )
