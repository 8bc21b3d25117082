"""A residual convolutional network whose blocks hold convolutional experts."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from modmoe.experts import ConvExpert, Expert
from modmoe.gating import Router, TopKRouter
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.tasks import TaskIds
from modmoe.vision.balance import carry_balancing_losses
from modmoe.vision.placement import Blocks, select_blocks
from modmoe.vision.vit import check_images

GROUPS = 8


class ConvMoELayer(MoELayer):
    """Experts of feature maps: each whole image goes to the experts that the router chooses by the map's mean.

    Args:
        pool: of ConvExpert without a linear map; it maps (C, height, width) to a map.
        router: of C features; it chooses experts for images, or images for experts.
        shared_expert: a module from map to map that every image passes through besides.
        backend: see MoELayer.
        namespace: see MoELayer.
    Raises:
        ValueError: on other experts, a router of another size, or one that mixes tokens or merges experts, which
            would take the images of a batch for one sequence.
    """

    @classmethod
    def check_pair(cls, router: Router, expert: Expert) -> None:
        if not isinstance(expert, ConvExpert) or expert.has_linear:
            raise ValueError(f"a pool of ConvExpert without a linear map is needed, got {expert}")
        if router.form not in ("choices", "triples"):
            raise ValueError(f"{type(router).__name__} gives {router.form}: it would mix the images of a batch")

    @classmethod
    def check_sizes(cls, router: Router, expert: Expert) -> None:
        assert isinstance(expert, ConvExpert)  # check_pair
        if router.in_features != expert.in_shape[0]:
            raise ValueError(
                f"the router takes {router.in_features} features, the maps have {expert.in_shape[0]} channels"
            )

    def forward(self, x: Tensor, *args: object, **options: object) -> Tensor:
        """(B, C, height, width) -> (B, C', height', width'); other arguments as of :meth:`MoELayer.route`."""
        assert isinstance(self.pool.expert, ConvExpert)  # check_pair
        check_images(x, self.pool.expert.in_shape)
        routing = self.route(x.mean((2, 3)), *args, **options)  # type: ignore[arg-type]
        y = self.mix(x.flatten(1), routing).unflatten(1, self.pool.expert.out_shape)
        return y if self.shared_expert is None else y + self.shared_expert(x)


class ConvMoENet(nn.Module):
    """Stem, stages of pre-activation residual blocks, mean over positions, linear head.

    A block is x + f(relu(norm(x))), with f two 3x3 convolutions and a ReLU between them, or experts of that form. Each
    stage after the first starts with a convolution of stride 2. Normalisation is by groups, which keeps no statistics
    that a later task could move. Conventions are those of timm, as in :class:`modmoe.vision.ViT`.

    Args:
        image_size: height and width of the images.
        num_classes: width of the output; 0 for features.
        in_channels: of the images.
        channels: of each stage, multiples of 8.
        blocks_per_stage: at least 1.
        blocks: which blocks hold experts, counted through all stages, see :func:`modmoe.vision.select_blocks`.
        num_experts: E.
        expert_channels: between an expert's two convolutions; None for the stage's channels.
        make_router: C -> a new router; None for the two best experts, with weights that add up to 1.
        balance_weight: of the balancing loss, see :func:`modmoe.vision.carry_balancing_losses`; 0 for none.
    Raises:
        ValueError: on a size below 1, channels that are no multiples of 8, or as select_blocks and ConvMoELayer.
    Source:
        He et al. 2016, identity mappings in deep residual networks (pre-activation). Experts that are whole residual
        functions, chosen for each image, are ours.
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64),
        blocks_per_stage: int = 2,
        blocks: Blocks = "every-2",
        num_experts: int = 4,
        expert_channels: int | None = None,
        make_router: Callable[[int], Router] | None = None,
        balance_weight: float = 0.01,
    ):
        super().__init__()
        if min(image_size, in_channels, blocks_per_stage) < 1 or num_classes < 0:
            raise ValueError(f"sizes must be at least 1, got {image_size=}, {in_channels=}, {blocks_per_stage=}")
        if not channels or any(size < 1 or size % GROUPS for size in channels):
            raise ValueError(f"channels are multiples of {GROUPS}, at least one, got {list(channels)}")
        self.image_shape = (in_channels, image_size, image_size)
        self.num_classes, self.num_features = num_classes, channels[-1]
        self.moe_blocks = select_blocks(blocks, len(channels) * blocks_per_stage)
        make = make_router or (lambda size: TopKRouter(size, min(2, num_experts), renormalize=True))
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.stages = nn.ModuleList()
        side, previous, position = image_size, channels[0], 0
        for stage, size in enumerate(channels):
            parts: list[nn.Module] = []
            if stage:
                parts.append(nn.Conv2d(previous, size, 3, stride=2, padding=1))
                side = (side - 1) // 2 + 1
            for _ in range(blocks_per_stage):
                body: nn.Module
                if position in self.moe_blocks:
                    expert = ConvExpert((size, side, side), [expert_channels or size, size], activation="relu")
                    body = ConvMoELayer(ExpertPool(expert, num_experts), make(size))
                else:
                    body = nn.Sequential(
                        nn.Conv2d(size, size, 3, padding=1), nn.ReLU(), nn.Conv2d(size, size, 3, padding=1)
                    )
                parts.append(ResidualBlock(size, body))
                position += 1
            self.stages.append(nn.Sequential(*parts))
            previous = size
        self.norm = nn.GroupNorm(GROUPS, previous)
        self.head = nn.Linear(previous, num_classes) if num_classes else nn.Identity()
        if balance_weight:
            carry_balancing_losses(self, balance_weight)

    def forward_features(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """The last feature map: (B, C, image_size, image_size) -> (B, D, height, width)."""
        check_images(x, self.image_shape)
        x = self.stem(x)
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for part in stage:
                x = part(x, task_ids) if isinstance(part, ResidualBlock) else part(x)
        return self.norm(x).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over positions and, unless ``pre_logits``, the head: (B, D) or (B, num_classes)."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """Classify; arguments and errors as of :meth:`modmoe.vision.ViT.forward`."""
        return self.forward_head(self.forward_features(x, task_ids))


class ResidualBlock(nn.Module):
    """x + body(relu(norm(x)))."""

    def __init__(self, channels: int, body: nn.Module):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.body = body

    def forward(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """(B, C, height, width) -> the same shape."""
        y = self.norm(x).relu()
        return x + (self.body(y, task_ids=task_ids) if isinstance(self.body, MoELayer) else self.body(y))
