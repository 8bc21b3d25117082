"""Dense backbones of torchvision and timm, with weights from a file."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from modmoe.hosts import import_host

Source = Literal["torchvision", "timm"]


def load_backbone(source: Source, name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a model by name and, if wanted, load a state dict; nothing is downloaded.

    Both libraries publish their weights as such files: torchvision at the ``url`` of each weights enum (``.pth``),
    timm on the Hugging Face hub (``model.safetensors``). With ``to_moe`` after it, the experts are copies of trained
    blocks.

    Args:
        source: "torchvision" or "timm".
        name: for instance "vit_b_16" or "swin_t", or timm's "vit_base_patch16_224".
        weights: a file of ``torch.save(state_dict)`` or safetensors; None for random weights.
        options: of the library's builder, for instance ``num_classes``.
    Raises:
        ValueError: on an unknown source, and of torchvision on an unknown name.
        RuntimeError: of timm on an unknown name, and if the weights do not fit the model.
        FileNotFoundError: if there is no such file.
        MissingExtraError: if the library is not installed.
    """
    if source == "torchvision":
        model = import_host("torchvision.models").get_model(name, weights=None, **options)
    elif source == "timm":
        model = import_host("timm").create_model(name, pretrained=False, **options)
    else:
        raise ValueError(f"source is 'torchvision' or 'timm', got {source!r}")
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        model.load_state_dict(state)
    return model
