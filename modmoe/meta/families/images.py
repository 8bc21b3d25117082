"""Image completion: a picture is a function from pixels to greys, and a task shows some of its pixels.

Axes: n pictures, B tasks, C context pixels, N = height * width.
"""

import torch
from torch import Tensor

from modmoe.meta.families.regression import context_bounds, random_mask
from modmoe.meta.task_batch import TaskBatch


class ImageCompletion:
    """Tasks from pictures: x is a pixel's (row, column) in [-1, 1]^2, y its grey in [0, 1].

    Args:
        images: (n, height, width), uint8 (divided by 255) or float in [0, 1]; n >= 1.
    Raises:
        ValueError: if the shape or the values are others.
    """

    def __init__(self, images: Tensor):
        if images.dim() != 3 or images.numel() == 0:
            raise ValueError(f"images are (n, height, width) with a pixel at least, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(f"images are uint8, or float within [0, 1], got {images.dtype} with values outside")
        self.images = images
        self.size = (images.shape[1], images.shape[2])

    @property
    def grid(self) -> Tensor:
        """(N, 2): every pixel, row by row. A side of one pixel lies at 0."""
        sides = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in self.size]
        return torch.cartesian_prod(*sides).to(self.images)

    def sample(
        self, num_tasks: int, context: int | tuple[int, int], generator: torch.Generator | None = None
    ) -> TaskBatch:
        """Tasks of pictures drawn with replacement; see ``tasks``."""
        if num_tasks < 1:
            raise ValueError(f"num_tasks is 1 or more, got {num_tasks}")
        return self.tasks(torch.randint(len(self.images), (num_tasks,), generator=generator), context, generator)

    def tasks(
        self, index: Tensor, context: int | tuple[int, int], generator: torch.Generator | None = None
    ) -> TaskBatch:
        """The tasks of some pictures.

        Args:
            index: (B,) int64, which pictures.
            context: how many pixels are shown, 0 to N; (low, high) draws a number for each task and pads with a mask.
            generator: where the randomness comes from; None is torch's own.
        Returns:
            D = 2, M = 1; a context of different pixels, uniformly drawn; every pixel is a target, the shown ones too.
        Raises:
            ValueError: if more pixels are asked for than there are.
        """
        low, high = context_bounds(context)
        grid, (height, width) = self.grid, self.size
        if high > height * width:
            raise ValueError(f"a picture has {height * width} pixels, asked for {high}")
        num_tasks = len(index)
        greys = self.images[index].reshape(num_tasks, height * width, 1)
        shown = torch.rand(num_tasks, height * width, generator=generator).argsort(1)[:, :high]
        mask = random_mask(num_tasks, low, high, generator)
        context_y = greys.gather(1, shown.unsqueeze(2))
        return TaskBatch(grid[shown], context_y, grid.expand(num_tasks, -1, -1), greys, mask)

    def to_images(self, values: Tensor) -> Tensor:
        """(B, N, 1) outputs of all pixels, as targets have them -> (B, height, width)."""
        return values.reshape(len(values), *self.size)

    def context_images(self, batch: TaskBatch) -> Tensor:
        """(B, height, width): what a task shows, NaN elsewhere."""
        height, width = self.size
        halves = torch.tensor([height - 1, width - 1]) / 2
        position = ((batch.clean_context()[0] + 1) * halves.to(self.images)).round().long()
        # a side of one pixel lies at 0, where the formula gives 0 as well
        flat = position[..., 0] * width + position[..., 1]
        pixels = self.images.new_full((batch.num_tasks, height * width + 1), torch.nan)
        flat = flat.masked_fill(~batch.present, height * width)  # a place that is thrown away
        pixels.scatter_(1, flat, batch.clean_context()[1].squeeze(2))
        return pixels[:, :-1].reshape(-1, height, width)
