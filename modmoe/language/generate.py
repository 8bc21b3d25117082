"""Continue texts, token by token."""

import torch
from torch import Tensor

from modmoe.language.attention import Cache
from modmoe.language.transformer import MoELanguageModel


@torch.no_grad()
def generate(
    model: MoELanguageModel,
    prompts: Tensor,
    num_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    domains: Tensor | None = None,
    cached: bool = True,
) -> Tensor:
    """Append tokens to prompts: the likeliest ones, or drawn from softmax(logits / temperature).

    With a cache of keys and values each token is computed once. Without one, everything is computed anew for each
    token, which gives the same up to rounding. The model is in evaluation meanwhile.

    Args:
        model: of any preset.
        prompts: (B, S) integers, padded on the left where they differ in length.
        num_tokens: how many to append, at least 1; with the prompt no more than the context.
        mask: (B, S) bool, True for real tokens; None for all.
        temperature: 0 for the likeliest token; of equal ones the lowest.
        generator: of the draws; None for torch's own.
        domains: (B,) for a DomainRouter.
        cached: see above.
    Returns:
        (B, S + num_tokens) int64, the prompts first.
    Raises:
        ValueError: if num_tokens is below 1 or the whole is past the context, on a negative temperature, padding that
            is not on the left, or a prompt without a token.
    """
    if num_tokens < 1 or temperature < 0:
        raise ValueError(
            f"num_tokens must be at least 1 and temperature not negative, got {num_tokens} and {temperature}"
        )
    if prompts.dim() != 2 or prompts.shape[1] + num_tokens > model.size.context:
        raise ValueError(
            f"prompts {tuple(prompts.shape)} and {num_tokens} more tokens are past the context of {model.size.context}"
        )
    if mask is not None and not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError("prompts are padded on the left: the mask has to be True from each first token to the end")
    was_training = model.training
    model.eval()
    tokens, real = prompts.long(), mask
    cache = Cache() if cached else None
    fresh, fresh_mask = tokens, real
    for _ in range(num_tokens):
        logits = model(fresh, fresh_mask, domains, cache)[:, -1]
        following = _choose(logits, temperature, generator)
        tokens = torch.cat([tokens, following], 1)
        if real is not None:
            real = torch.cat([real, torch.ones_like(following, dtype=torch.bool)], 1)
        fresh, fresh_mask = (following, None) if cached else (tokens, real)
    model.train(was_training)
    return tokens


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """(B, 1) the next tokens by logits (B, V)."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(1), 1, generator=generator)
