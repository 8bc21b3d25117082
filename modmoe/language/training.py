"""Train a language model, and measure how well it predicts."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.language.corpus import sample_windows
from modmoe.language.transformer import MoELanguageModel
from modmoe.optim import sync_optimizer

WARM_UP = 0.05  # of the steps
FINAL_RATE = 0.1  # of the learning rate
CLIP = 1.0


def fit(
    model: MoELanguageModel,
    text: Tensor,
    num_steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
    domain: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> list[float]:
    """Train on pieces of a text, each as long as the context, with AdamW; routers are updated after each step.

    The learning rate rises over the first 20th of the steps and falls linearly to a tenth. Gradients are clipped to
    norm 1.

    Args:
        model: trained in place; what is frozen stays.
        text: (n,) integers.
        num_steps: S.
        batch_size: pieces in a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        domain: of the text, for a DomainRouter.
        optimizer: continued in place of a new AdamW, after syncing it with the model; its learning rates stay.
        seed: of the pieces.
    Returns:
        The loss of each step, auxiliary losses included.
    Raises:
        ValueError: if the text is shorter than a piece, num_steps below 1, or nothing can be trained.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if num_steps < 1 or not trainable:
        raise ValueError(f"steps and something to train are needed, got {num_steps} steps, {len(trainable)} tensors")
    schedule = None
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable, learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    else:
        sync_optimizer(optimizer, model)
    generator = torch.Generator().manual_seed(seed)
    domains = None if domain is None else torch.full((batch_size,), domain)
    model.train()
    losses = []
    for _ in range(num_steps):
        windows = sample_windows(text, batch_size, model.size.context + 1, generator)
        optimizer.zero_grad()
        loss = model.loss(windows, domains)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        model.update_routers()
        losses.append(float(loss.detach()))
        if schedule is not None:
            schedule.step()
    return losses


def _rate(step: int, num_steps: int) -> float:
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 1 - (1 - FINAL_RATE) * (step - warm_up) / max(1, num_steps - warm_up)


@torch.no_grad()
def log_probabilities(
    model: MoELanguageModel, documents: Sequence[Tensor], domain: int | None = None, batch_size: int = 32
) -> list[Tensor]:
    """log p of each token of each document but its first, in evaluation.

    A document is cut into pieces as long as the context; a token is predicted from those before it in its piece.

    Args:
        model: stays in the mode that it is in.
        documents: (n,) integers each, n > 1.
        domain: of all of them, for a DomainRouter.
        batch_size: pieces computed at once.
    Returns:
        (n - 1,) float32 for each, in nats.
    Raises:
        ValueError: on no document, or one without a token to predict.
    """
    if not documents or min(map(len, documents)) < 2:
        raise ValueError("documents of at least two tokens are needed: the first one is not predicted")
    was_training, context = model.training, model.size.context
    model.eval()
    pieces = []
    for document in documents:
        inputs, targets = document[:-1].long(), document[1:].long()
        padding = -len(inputs) % context  # on the right, where nobody looks
        pieces += zip(
            F.pad(inputs, (0, padding)).view(-1, context), F.pad(targets, (0, padding)).view(-1, context), strict=True
        )
    found = []
    for first in range(0, len(pieces), batch_size):
        inputs, targets = (torch.stack(part) for part in zip(*pieces[first : first + batch_size], strict=True))
        domains = None if domain is None else torch.full((len(inputs),), domain)
        scores = model(inputs, domains=domains).float().log_softmax(2)
        found.append(scores.gather(2, targets.unsqueeze(2)).flatten())
    model.train(was_training)
    everything = torch.cat(found)
    lengths = [len(document) - 1 for document in documents]
    padded = [-(-length // context) * context for length in lengths]
    return [part[:length] for part, length in zip(everything.split(padded), lengths, strict=True)]


def mean_loss(log_probs: Sequence[Tensor]) -> float:
    """-mean log p over all tokens of all documents, in nats."""
    return -float(torch.cat(list(log_probs)).double().mean())


def perplexity(model: MoELanguageModel, documents: Sequence[Tensor], domain: int | None = None) -> float:
    """exp(-mean log p) of a token: with bytes as tokens, from 1 to about 256; see :func:`log_probabilities`."""
    return math.exp(mean_loss(log_probabilities(model, documents, domain)))


def perplexity_by_genre(
    model: MoELanguageModel, documents: Mapping[str, Sequence[Tensor]], domains: Mapping[str, int] | None = None
) -> dict[str, float]:
    """The perplexity of each genre's documents.

    Args:
        model: see :func:`log_probabilities`.
        documents: genre -> documents.
        domains: genre -> domain, for a DomainRouter.
    Raises:
        ValueError: if a genre's domain is not known.
    """
    if domains is not None and (missing := sorted(set(documents) - set(domains))):
        raise ValueError(f"no domain is known of {missing}, only of {sorted(domains)}")
    return {
        genre: perplexity(model, texts, None if domains is None else domains[genre])
        for genre, texts in documents.items()
    }
