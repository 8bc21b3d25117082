"""The vision transformer that all models here share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.layer import MoELayer
from modmoe.tasks import TaskIds
from modmoe.vision.placement import Blocks, select_blocks


class ViT(nn.Module):
    """Patches -> tokens -> ``depth`` blocks of attention and feed-forward -> mean over tokens -> linear head.

    Blocks are pre-norm: x = x + attn(norm1(x)), x = x + mlp(norm2(x)). There is no class token: the head reads the
    mean of the normalised tokens. Names and conventions are timm's: ``forward_features``, ``forward_head``,
    ``num_features``, and ``num_classes=0`` for a model whose output is the pooled features.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch; it divides image_size.
        num_classes: width of the output; 0 for features (B, D).
        features: D.
        depth: number of blocks.
        num_heads: of attention; it divides D.
        hidden_features: H of the dense feed-forward blocks.
        in_channels: of the images.
        make_layer: (D, H, S), S the number of tokens, -> a new MoELayer for each of ``blocks``; None for a dense model.
        blocks: which blocks hold experts, see :func:`modmoe.vision.select_blocks`.
    Raises:
        ValueError: on patches that do not divide the image, heads that do not divide D, a size below 1, or as
            select_blocks.
    Source:
        Dosovitskiy et al. 2021; the mean in place of a class token as in Beyer et al. 2022.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        features: int,
        depth: int,
        num_heads: int,
        hidden_features: int,
        in_channels: int = 3,
        make_layer: Callable[[int, int, int], MoELayer] | None = None,
        blocks: Blocks = "last-2",
    ):
        super().__init__()
        if num_classes < 0 or min(features, depth, num_heads, hidden_features) < 1:
            raise ValueError(
                "num_classes must be at least 0 and sizes at least 1, got "
                f"{num_classes=}, {features=}, {depth=}, {num_heads=}, {hidden_features=}"
            )
        self.num_classes = num_classes
        self.num_features = features
        self.moe_blocks = () if make_layer is None else select_blocks(blocks, depth)
        self.patch_embed = PatchEmbed(image_size, patch_size, in_channels, features)
        self.blocks = nn.ModuleList()
        for position in range(depth):
            mlp: nn.Module = FeedForward(features, hidden_features)
            if make_layer is not None and position in self.moe_blocks:
                mlp = make_layer(features, hidden_features, self.patch_embed.num_tokens)
            self.blocks.append(Block(features, num_heads, mlp))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """The normalised tokens: (B, C, image_size, image_size) -> (B, S, D); ValueError on another shape."""
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, task_ids)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, S, D) and, unless ``pre_logits``, classify: (B, D) or (B, num_classes)."""
        pooled = x.mean(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """Classify.

        Args:
            x: (B, C, image_size, image_size) float.
            task_ids: one task for all images, or one for each; see MoELayer.forward.
        Returns:
            (B, num_classes) logits, or (B, D) where num_classes is 0.
        Raises:
            ValueError: on another shape, and as MoELayer.
        """
        return self.forward_head(self.forward_features(x, task_ids))


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each linearly, plus a learned vector for its place.

    Args:
        image_size: height and width.
        patch_size: height and width of a patch.
        in_channels: C.
        features: D.
    Raises:
        ValueError: if patches do not divide the image, or on a size below 1.
    """

    def __init__(self, image_size: int, patch_size: int, in_channels: int, features: int):
        super().__init__()
        self.image_shape = (in_channels, image_size, image_size)
        self.num_tokens = num_tokens(image_size, patch_size)
        self.proj = nn.Conv2d(in_channels, features, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(self.num_tokens, features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, image_size, image_size) -> (B, S, D)."""
        check_images(x, self.image_shape)
        return self.proj(x).flatten(2).transpose(1, 2) + self.position


class Attention(nn.Module):
    """Multi-head self-attention without a mask.

    Args:
        features: D.
        num_heads: a divisor of D.
    Raises:
        ValueError: if num_heads does not divide D.
    """

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        if features % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {features} features")
        self.num_heads = num_heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """gelu(x W + b) W' + b', the dense twin of an MLPExpert."""

    def __init__(self, features: int, hidden_features: int):
        super().__init__(nn.Linear(features, hidden_features), nn.GELU(), nn.Linear(hidden_features, features))


class Block(nn.Module):
    """One pre-norm transformer block, see ViT."""

    def __init__(self, features: int, num_heads: int, mlp: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attn = Attention(features, num_heads)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = mlp

    def forward(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + (self.mlp(y, task_ids=task_ids) if isinstance(self.mlp, MoELayer) else self.mlp(y))


def num_tokens(image_size: int, patch_size: int) -> int:
    """S = (image_size / patch_size)^2; ValueError unless the patches divide the image."""
    if image_size < 1 or patch_size < 1 or image_size % patch_size:
        raise ValueError(f"patches of {patch_size}x{patch_size} do not divide an image of {image_size}x{image_size}")
    return (image_size // patch_size) ** 2


def check_images(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x is (B, *shape)."""
    if x.dim() != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"images of shape (B, {', '.join(map(str, shape))}) are needed, got {tuple(x.shape)}")
