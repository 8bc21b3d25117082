"""Few-shot classification of pictures of classes that were never seen in training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from modmoe.analysis import MethodRecord, half_width
from modmoe.experiments.meta.families_settings import check_distinct
from modmoe.experiments.meta.fewshot_methods import ABOUT, INNER_STEPS, METHODS, FewShotModel, Method, make_model
from modmoe.experiments.meta.figures import draw_images
from modmoe.experiments.meta.training import EVALUATION, TRAINING, Schedule, fit, generator_of
from modmoe.growth import count_parameters
from modmoe.meta.families import Episode, FewShotImages, load_image_set, split_classes

CHUNK = 50  # episodes that are answered at once


@dataclass
class FewShotConfig:
    """Classes are split anew for each seed; both sides draw episodes of the same kind.

    Args:
        data: scikit-learn's digits, or a set of pictures below root.
        root: folder of the files that scripts/fetch_data.py gets.
        methods: which run, pixel_prototypes first: the others are compared with it, episode by episode.
        ways: classes of an episode.
        shots: support pictures of each class.
        queries: query pictures of each class.
        test_share: of the classes.
        turned_classes: whether in training a class turned by a quarter, a half or three quarters is another class.
        iterations: of Adam.
        maml_iterations: of MAML, whose steps take longest.
        tasks: episodes in each of them.
        learning_rate: its maximum.
        evaluation_tasks: episodes of the test, the same for all methods of a seed.
    """

    data: Literal["digits", "glyphs", "letters", "emoji_kinds"] = "digits"
    root: str = "data"
    methods: list[Method] = field(default_factory=lambda: list(METHODS))
    ways: int = 5
    shots: int = 1
    queries: int = 3
    test_share: float = 0.5
    turned_classes: bool = True
    iterations: int = 1000
    maml_iterations: int = 1000
    tasks: int = 8
    learning_rate: float = 2e-3
    evaluation_tasks: int = 600

    def __post_init__(self) -> None:
        numbers = (self.shots, self.queries, self.iterations, self.maml_iterations, self.tasks, self.evaluation_tasks)
        if min(numbers) < 1 or self.ways < 2:
            raise ValueError("ways must be at least 2, and every other number at least 1")
        check_distinct("methods", self.methods)
        if self.methods[0] != "pixel_prototypes":
            raise ValueError(f"methods start with 'pixel_prototypes', which the others should beat; got {self.methods}")

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        progress("data")
        train, test = self.load(seed)
        episodes = test.sample(
            self.evaluation_tasks, self.ways, self.shots, self.queries, generator_of(EVALUATION, seed)
        )
        records, accuracies = {}, {}
        for method in self.methods:
            progress(method)
            model = make_model(method, test.images.shape[1], self.ways, seed)
            parameters = float(count_parameters(model).total)
            seconds = self.train(model, method, train, seed) if parameters else 0.0
            accuracies[method], nll = evaluate(model, episodes)
            record = MethodRecord(with_interval("accuracy", accuracies[method]), about=ABOUT[method])
            record.metrics |= {"nll": nll, "parameters": parameters, "seconds": seconds}
            if method != self.methods[0]:
                difference = accuracies[method] - accuracies[self.methods[0]]
                record.metrics |= with_interval(f"difference/{method}-{self.methods[0]}/accuracy", difference)
            records[method] = record
            record.about = record.about.format(steps=INNER_STEPS)
        records[self.methods[0]].pictures["an episode"] = draw_episode(episodes)
        return records

    def load(self, seed: int) -> tuple[FewShotImages, FewShotImages]:
        """Classes to train on, and others to test on."""
        pictures = load_image_set(self.data, self.root)
        train, test = split_classes(pictures.labels, self.test_share, seed)
        images, labels = pictures.images, pictures.labels
        return (
            FewShotImages(images[train], labels[train], rotations=self.turned_classes),
            FewShotImages(images[test], labels[test]),
        )

    def train(self, model: FewShotModel, method: Method, images: FewShotImages, seed: int) -> float:
        """Seconds of training on fresh episodes."""
        generator = generator_of(TRAINING, seed)
        iterations = self.maml_iterations if method == "maml" else self.iterations

        def loss(iteration: int) -> Tensor:
            return model.loss(images.sample(self.tasks, self.ways, self.shots, self.queries, generator))

        return fit(model, Schedule(iterations, self.tasks, self.learning_rate, clip=1.0), loss)


@torch.no_grad()
def evaluate(model: FewShotModel, episodes: Episode) -> tuple[Tensor, float]:
    """(B,) the accuracy of each episode, and the mean of -ln p of the queries' classes."""
    log_probs = torch.cat(
        [model(part_of(episodes, slice(start, start + CHUNK))) for start in range(0, episodes.num_tasks, CHUNK)]
    )
    nll = -log_probs.gather(2, episodes.query_y.unsqueeze(2)).mean()
    return episodes.accuracy(log_probs), float(nll)


def part_of(episodes: Episode, rows: slice) -> Episode:
    """Some of the tasks."""
    support, query = (
        (episodes.support_x[rows], episodes.support_y[rows]),
        (episodes.query_x[rows], episodes.query_y[rows]),
    )
    return Episode(*support, *query, episodes.num_ways, episodes.classes[rows], episodes.turns[rows])


def with_interval(name: str, values: Tensor) -> dict[str, float]:
    """The mean over episodes, and half of its 95% interval under the name ``half_width/...``."""
    half = half_width(values.double().tolist()) or 0.0
    return {name: float(values.double().mean()), f"half_width/{name.removeprefix('difference/')}": half}


def draw_episode(episodes: Episode):
    """The first episode: a row for each class, its support and then its queries."""
    shots = episodes.support_y.shape[1] // episodes.num_ways
    rows = []
    for label in range(episodes.num_ways):
        support = episodes.support_x[0, label * shots : (label + 1) * shots]
        queries = episodes.query_x[0, episodes.query_y[0] == label]
        rows.append((f"class {int(episodes.classes[0, label])}", torch.cat([support, queries])))
    return draw_images(
        rows, f"The first episode of the test: {shots} support pictures of each class, then its queries."
    )
