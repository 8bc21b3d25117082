"""Few-shot episodes: n classes that were never seen, k pictures of each, and more pictures to name.

Axes: B tasks, W ways, K shots, S = W * K support pictures, Q query pictures of all classes, H and V the height and
width of a picture.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.meta.task_batch import TaskBatch


@dataclass(frozen=True)
class Episode:
    """Tasks of W-way classification.

    Args:
        support_x: (B, S, H, V) float. The shots of a class stand side by side: S is W blocks of K.
        support_y: (B, S) int64 in 0..W-1.
        query_x: (B, Q, H, V) float.
        query_y: (B, Q) int64.
        num_ways: W.
        classes: (B, W) int64, which class of the data each label stands for.
        turns: (B, W) int64, by how many quarters of a turn its pictures are turned.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    num_ways: int
    classes: Tensor
    turns: Tensor

    @property
    def num_tasks(self) -> int:
        """B."""
        return self.support_y.shape[0]

    def task_batch(self) -> TaskBatch:
        """For models of functions: x the pixels (D = H * V), y the class as one of W (M = W)."""
        support_y, query_y = (F.one_hot(y, self.num_ways).to(self.support_x) for y in (self.support_y, self.query_y))
        return TaskBatch(self.support_x.flatten(2), support_y, self.query_x.flatten(2), query_y)

    def accuracy(self, logits: Tensor) -> Tensor:
        """(B, Q, W) scores of the query pictures -> (B,), the share that is named right."""
        return (logits.argmax(2) == self.query_y).float().mean(1)

    def to(self, device: Any) -> "Episode":
        """Every tensor on a device."""
        support, query = (self.support_x.to(device), self.support_y.to(device)), self.query_x.to(device)
        rest = self.query_y.to(device), self.num_ways, self.classes.to(device), self.turns.to(device)
        return Episode(*support, query, *rest)


class FewShotImages:
    """Episodes from pictures with labels.

    Args:
        images: (n, H, V) float.
        labels: (n,) int64, any numbers.
        rotations: let a picture's class be (label, quarter turn): four times the classes, and a task may hold the same
            label turned in two ways, as two classes. Pictures are square then.
    Raises:
        ValueError: if the shapes do not go together, or rotations are asked of pictures that are not square.
    Source:
        Vinyals et al. 2016, Matching Networks, for the protocol; Santoro et al. 2016 for the rotations.
    """

    def __init__(self, images: Tensor, labels: Tensor, rotations: bool = False):
        if images.dim() != 3 or not images.is_floating_point() or labels.shape != images.shape[:1] or len(labels) == 0:
            raise ValueError(
                f"images are float (n, height, width) and labels (n,), n >= 1, got {images.dtype} "
                f"{tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if rotations and images.shape[1] != images.shape[2]:
            raise ValueError(f"only square pictures can be turned, these are {tuple(images.shape[1:])}")
        self.images, self.labels, self.rotations = images, labels, rotations
        self.class_labels, position, counts = labels.unique(return_inverse=True, return_counts=True)
        self.counts = counts
        # (classes, most pictures of a class): which pictures, -1 where a class has fewer
        order = position.argsort(stable=True)
        column = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.table = torch.full((len(counts), int(counts.max())), -1)
        self.table[position[order], column] = order

    @property
    def num_classes(self) -> int:
        """Labels; times four with rotations."""
        return len(self.counts) * (4 if self.rotations else 1)

    def sample(
        self, num_tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator | None = None
    ) -> Episode:
        """Draw episodes.

        Args:
            num_tasks: B, 1 or more.
            ways: classes in a task, 2 or more, different ones.
            shots: support pictures of each class; 0 gives an empty support.
            queries: query pictures of each class, 1 or more, none of them in the support.
            generator: where the randomness comes from; None is torch's own.
        Raises:
            ValueError: if a number is out of range, or fewer than ``ways`` classes have ``shots + queries`` pictures.
        """
        if num_tasks < 1 or ways < 2 or shots < 0 or queries < 1:
            raise ValueError(
                f"num_tasks and queries are 1 or more, ways 2 or more and shots 0 or more, got {num_tasks} tasks, "
                f"{ways} ways, {shots} shots, {queries} queries"
            )
        each = shots + queries
        able = (self.counts >= each).nonzero().squeeze(1)
        turns_of = 4 if self.rotations else 1
        if len(able) * turns_of < ways:
            raise ValueError(
                f"{ways} ways of {each} pictures each: only {len(able) * turns_of} of {self.num_classes} classes have "
                "as many"
            )
        drawn = torch.rand(num_tasks, len(able) * turns_of, generator=generator).argsort(1)[:, :ways]
        rows, turns = able[drawn // turns_of], drawn % turns_of
        table = self.table[rows]
        keys = torch.rand(table.shape, generator=generator).masked_fill(table < 0, 2.0)  # those that are not there last
        index = table.gather(2, keys.argsort(2)[:, :, :each])
        pictures = self._turned(self.images[index], turns)
        y = torch.arange(ways).expand(num_tasks, ways).unsqueeze(2)
        parts = [(pictures[:, :, :shots], shots), (pictures[:, :, shots:], queries)]
        (support_x, support_y), (query_x, query_y) = ((x.flatten(1, 2), y.repeat(1, 1, n).flatten(1)) for x, n in parts)
        return Episode(support_x, support_y, query_x, query_y, ways, self.class_labels[rows], turns)

    def _turned(self, pictures: Tensor, turns: Tensor) -> Tensor:
        """(B, W, each, H, V), each class turned by (B, W) quarters."""
        if not self.rotations:
            return pictures
        turned = pictures.clone()
        for quarter in range(1, 4):
            chosen = turns == quarter
            turned[chosen] = torch.rot90(pictures[chosen], quarter, (2, 3))
        return turned


def split_classes(labels: Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of pictures whose classes are for training, and of those whose classes are for testing.

    Args:
        labels: (n,) int64.
        test_share: of the classes, in (0, 1); at least one class goes to either side.
        seed: equal seeds split equally.
    Returns:
        Two (m,) int64, together each index once and no class on both sides.
    Raises:
        ValueError: if the share is not in (0, 1), or there is a single class.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share lies in (0, 1), got {test_share}")
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError("one class cannot be split into classes for training and classes for testing")
    num_test = min(max(1, round(test_share * len(classes))), len(classes) - 1)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    testing = torch.isin(labels, classes[order[:num_test]])
    return (~testing).nonzero().squeeze(1), testing.nonzero().squeeze(1)


def nearest_prototype(episode: Episode) -> Tensor:
    """The pixel baseline: minus the squared distance of a query picture to the mean picture of each class.

    Returns:
        (B, Q, W), to be used as logits.
    Raises:
        ValueError: if the support is empty.
    Source:
        Snell et al. 2017, Prototypical Networks, equations 1 and 2 with the identity as the embedding.
    """
    if episode.support_y.shape[1] == 0:
        raise ValueError("an empty support has no prototypes: shots is 1 or more")
    batch = episode.task_batch()
    sums = batch.context_y.mT @ batch.context_x
    means = sums / batch.context_y.sum(1).unsqueeze(2)
    return -torch.cdist(batch.target_x, means).square()
