"""Image completion: neural processes that see some pixels of pictures they were not trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from modmoe.analysis import MethodRecord
from modmoe.experiments.meta.families_settings import check_distinct
from modmoe.experiments.meta.figures import draw_images
from modmoe.experiments.meta.processes import ABOUT, PROCESS_NAMES, Process, ProcessName, make_process
from modmoe.experiments.meta.scores import Scores, averages, score_in_chunks
from modmoe.experiments.meta.training import EVALUATION, TRAINING, Schedule, fit, generator_of
from modmoe.growth import count_parameters
from modmoe.meta import Predictive, TaskBatch
from modmoe.meta.families import ImageCompletion, load_image_set

LEAST_CONTEXT = 3
NUM_DRAWN = 8  # pictures in a figure
TEST_SHARE = 0.25


@dataclass
class ImageCompletionConfig:
    """Pixels of a picture are a task: some are shown, all are asked for.

    Args:
        data: scikit-learn's digits (8x8), or MNIST (28x28) below root.
        root: folder of the files that scripts/fetch_data.py gets.
        methods: which run.
        iterations: of Adam.
        tasks: pictures in each of them.
        learning_rate: its maximum.
        training_targets: pixels of a picture that a step is trained on, drawn anew; all if there are no more.
        percent: of the pixels that evaluation shows. In training it is a number from 3 pixels to the largest of these.
        evaluation_tasks: pictures of the test.
        num_samples: draws of a latent in evaluation.
    """

    data: Literal["digits", "mnist"] = "digits"
    root: str = "data"
    methods: list[ProcessName] = field(default_factory=lambda: list(PROCESS_NAMES))
    iterations: int = 2000
    tasks: int = 32
    learning_rate: float = 2e-3
    training_targets: int = 64
    percent: list[int] = field(default_factory=lambda: [10, 30, 50])
    evaluation_tasks: int = 200
    num_samples: int = 32

    def __post_init__(self) -> None:
        numbers = (self.iterations, self.tasks, self.training_targets, self.evaluation_tasks, self.num_samples)
        if min(numbers) < 1:
            raise ValueError("every number of iterations, tasks, targets and samples must be at least 1")
        check_distinct("methods", self.methods)
        check_distinct("percent", self.percent)
        if not all(5 <= share <= 100 for share in self.percent):
            raise ValueError(f"percent are shares of the pixels, from 5 to 100, got {self.percent}")

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        train, test = self.load(seed)
        index = torch.randperm(len(test.images), generator=generator_of(EVALUATION, seed))[: self.evaluation_tasks]
        evaluation = {
            share: test.tasks(index, self.num_shown(test, share), generator_of(EVALUATION, seed, 1 + stream))
            for stream, share in enumerate(self.percent)
        }
        records = {}
        for method in self.methods:
            progress(method)
            process = make_process(method, 2, self.num_samples, seed)
            seconds = self.train(process, train, seed)
            metrics = averages(score_images(process, evaluation))
            record = MethodRecord({name.replace("nll_marginal", "nll"): value for name, value in metrics.items()})
            record.metrics |= {"parameters": float(count_parameters(process.model).total), "seconds": seconds}
            record.about = ABOUT[method]
            self.draw(process, method, test, evaluation, record)
            records[method] = record
        return records

    def load(self, seed: int) -> tuple[ImageCompletion, ImageCompletion]:
        """Pictures to train on, and others to test on."""
        if self.data == "mnist":
            from modmoe.continual.datasets import load_images  # takes seconds: it imports the continual hosts

            train, test = (load_images("mnist", self.root, part)[0].unflatten(1, (28, 28)) for part in (True, False))
            return ImageCompletion(train), ImageCompletion(test)
        images = load_image_set("digits").images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        num_test = round(TEST_SHARE * len(images))
        return ImageCompletion(images[order[num_test:]]), ImageCompletion(images[order[:num_test]])

    def num_shown(self, images: ImageCompletion, share: int) -> int:
        """Pixels that are so many percent."""
        return max(LEAST_CONTEXT, round(share / 100 * images.size[0] * images.size[1]))

    def train(self, process: Process, images: ImageCompletion, seed: int) -> float:
        """Seconds of training."""
        generator = generator_of(TRAINING, seed)
        most = self.num_shown(images, max(self.percent))
        num_pixels = images.size[0] * images.size[1]

        def loss(iteration: int) -> Tensor:
            batch = images.sample(self.tasks, (LEAST_CONTEXT, most), generator)
            if self.training_targets < num_pixels:
                batch = with_targets(batch, torch.randperm(num_pixels, generator=generator)[: self.training_targets])
            return process.loss(batch)

        return fit(process.model, Schedule(self.iterations, self.tasks, self.learning_rate, clip=5.0), loss)

    @torch.no_grad()
    def draw(
        self,
        process: Process,
        method: str,
        images: ImageCompletion,
        evaluation: dict[int, TaskBatch],
        record: MethodRecord,
    ) -> None:
        """The first pictures of the test: what was shown, and what is expected."""
        rows: list[tuple[str, Tensor]] = []
        for share, batch in evaluation.items():
            first = batch[:NUM_DRAWN]
            rows.append((f"{share}% shown", images.context_images(first)))
            rows.append(("completed", images.to_images(process.answer(first).mean)))
            truth = first.target_y
        assert truth is not None
        rows.append(("truth", images.to_images(truth)))
        caption = f"{method} on pictures of the test; blue is what was not shown"
        record.pictures["completed images"] = draw_images(rows, caption)


def score_images(process: Process, evaluation: dict[int, TaskBatch]) -> Scores:
    """Of each share of pixels."""
    found: Scores = {}
    for share, batch in evaluation.items():

        def answer(rows: slice, batch: TaskBatch = batch) -> Predictive:
            return process.answer(batch[rows])

        for metric, values in score_in_chunks(answer, batch).items():
            found.setdefault(metric, {})[(str(share),)] = values
    return found


def with_targets(batch: TaskBatch, index: Tensor) -> TaskBatch:
    """The same tasks with some of their targets."""
    assert batch.target_y is not None
    return TaskBatch(
        batch.context_x, batch.context_y, batch.target_x[:, index], batch.target_y[:, index], batch.context_mask
    )
