"""The settings of an image-classification run."""

from dataclasses import dataclass, field
from typing import Literal

from modmoe.vision import select_blocks
from modmoe.vision.vit import num_tokens

Method = Literal["dense", "vmoe", "soft_moe"]
IMAGE_SIZES = {"digits": 8, "mnist": 28}


@dataclass
class VisionSettings:
    """What can be set; ``hidden_features`` is the dense model's, and the experts' follow from it.

    Args:
        data: scikit-learn's 8x8 digits; MNIST; or a folder with the images of each class in a folder of its own, below
            train and below val.
        root: the folder that holds MNIST/raw (scripts/fetch_data.py mnist), or train and val.
        test_share: share of each class kept for the test, where the data come without a split.
        num_train: training images; null for all.
        num_test: test images; null for all.
        image_size: height and width to which an image folder's images are cut; the others have theirs.
        methods: what runs.
        patch_size: height and width of a patch.
        features: size of a token.
        depth: number of blocks.
        num_heads: of attention.
        hidden_features: of the dense feed-forward blocks.
        blocks: which blocks hold experts: all, last-n or every-n.
        num_experts: in each of these.
        top_k: experts for each token, of vmoe.
        capacity_factor: of vmoe in training.
        eval_capacity_factor: of vmoe in evaluation.
        balance_weight: of vmoe's importance and load loss each.
        slots: of each expert of soft_moe.
        epochs: passes over the training images.
        batch_size: images in a step, of all processes together.
        learning_rate: of AdamW, at its peak.
        weight_decay: of AdamW.
        warmup_epochs: in which the learning rate rises to its peak; then it falls as a cosine to 0.
        clip_norm: largest norm of the gradient.
        ema_decay: of the running average of the weights that is tested.
        precision: of the matrix products in training and test (bfloat16 by autocast).
        workers: processes that read an image folder.
        checkpoints: folder for a checkpoint after each epoch, from which a run goes on; null for none.
    """

    data: Literal["digits", "mnist", "image_folder"] = "digits"
    root: str = "data"
    test_share: float = 0.25
    num_train: int | None = None
    num_test: int | None = None
    image_size: int = 224
    methods: list[Method] = field(default_factory=lambda: ["dense", "vmoe", "soft_moe"])
    patch_size: int = 2
    features: int = 64
    depth: int = 4
    num_heads: int = 4
    hidden_features: int = 128
    blocks: str = "last-2"
    num_experts: int = 8
    top_k: int = 2
    capacity_factor: float = 1.05
    eval_capacity_factor: float = 4.0
    balance_weight: float = 0.005
    slots: int = 2
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 0.002
    weight_decay: float = 0.05
    warmup_epochs: int = 4
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = 0
    checkpoints: str | None = None

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods are at least one, each once, got {self.methods}")
        if min(self.epochs, self.batch_size) < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                "epochs and batch_size are at least 1, and warmup_epochs below epochs, got "
                f"{self.epochs}, {self.batch_size} and {self.warmup_epochs}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        select_blocks(self.blocks, self.depth)
        num_tokens(IMAGE_SIZES.get(self.data, self.image_size), self.patch_size)
