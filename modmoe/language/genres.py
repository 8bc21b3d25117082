"""Genre after genre: a pool that grows an expert for each, and mixes them without being told the genre.

Avalanche's loop is not used here: its plugin masks logits by class and fits gates to one feature vector a sample,
where text has a target for each token and its gate is the likelihood of what came before.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modmoe.gating import DomainRouter
from modmoe.growth import count_parameters, freeze, grow
from modmoe.language.training import fit, log_probabilities
from modmoe.language.transformer import MoELanguageModel


class GenreLearner:
    """p(x_t | before) = sum_e p(e | before) p_e(x_t | before), with p(e | before) in proportion to p_e(before).

    The first genre trains all of the model. Then all but the pools is frozen, and each later genre trains one new
    expert in each pool, which starts as a copy of the one that predicts the new genre's text best. A finished expert
    is frozen: what it predicts is the same to the last bit for ever. At test time nobody names a genre: each expert's
    own likelihood of the document so far is its evidence, with an equal prior. A new expert can cost an earlier genre
    no more than log(n / (n - 1)) nats a *document*, if all of its evidence speaks for the new one; where the new one
    predicts better, the mixture gains.

    Every expert computes every token at test time.

    Args:
        model: the preset ``demix`` with one expert, or any with DomainRouters alone.
    Attributes:
        experts: genre -> stable id of its expert, in the order of learning.
    Raises:
        ValueError: on another router, or more than one expert in a pool.
    Source:
        Gururangan et al. 2021 (DEMix), who mix by the posterior of a domain; theirs is that of the document's start and
        mixes within layers, ours is updated with each token and mixes predictions: Bayesian model averaging.
    """

    def __init__(self, model: MoELanguageModel):
        layers = model.layers
        if not layers or any(not isinstance(layer.router, DomainRouter) for layer in layers):
            raise ValueError("every layer of experts needs a DomainRouter: use the preset 'demix'")
        if any(layer.pool.ids != (0,) for layer in layers):
            raise ValueError("the model has to start with one expert in each pool")
        self.model = model
        self.experts: dict[str, int] = {}

    def learn(
        self,
        genre: str,
        text: Tensor,
        num_steps: int,
        batch_size: int = 16,
        learning_rate: float = 3e-3,
        seed: int = 0,
    ) -> list[float]:
        """Train the genre's expert, and freeze it.

        Args:
            genre: a new name.
            text: (n,) integers.
            num_steps: see :func:`fit`, as the others.
            batch_size: pieces in a step.
            learning_rate: at its highest.
            seed: of the pieces.
        Returns:
            The loss of each step.
        Raises:
            ValueError: on a genre that has been learned, or as :func:`fit` does; nothing is changed then.
        """
        if genre in self.experts:
            raise ValueError(f"'{genre}' has been learned, and its expert is frozen")
        if len(text) <= self.model.size.context:
            raise ValueError(f"a text of {len(text)} tokens is no longer than the context of {self.model.size.context}")
        expert_id = self._grow(text) if self.experts else 0
        losses = fit(self.model, text, num_steps, batch_size, learning_rate, domain=expert_id, seed=seed)
        self.model.requires_grad_(False)  # the shared parts; experts that come are trainable again
        freeze(self.model, [expert_id])
        self.experts[genre] = expert_id
        return losses

    @torch.no_grad()
    def _grow(self, text: Tensor) -> int:
        sample = [text[: 16 * self.model.size.context]]
        likelihoods = {i: float(log_probabilities(self.model, sample, i)[0].sum()) for i in self.experts.values()}
        source = max(likelihoods, key=lambda expert_id: likelihoods[expert_id])
        (expert_id,) = {new for ids in grow(self.model).values() for new in ids}  # all pools grow alike
        for layer in self.model.layers:
            known = layer.pool.namespace("expert", [source])
            for name in known:
                for cohort, rows, _ in layer.pool.growable("expert", name).banks():
                    if rows[0].owner == expert_id:
                        cohort.copy_(known[name])
        return expert_id

    def log_probabilities(self, documents: Sequence[Tensor], genre: str | None = None) -> list[Tensor]:
        """log p of each token of each document but its first: (n - 1,) float32 each.

        Args:
            documents: see :func:`modmoe.language.log_probabilities`.
            genre: told, as an oracle would; None to mix by the evidence.
        Raises:
            ValueError: on an unknown genre, or before any is learned.
        """
        if not self.experts or (genre is not None and genre not in self.experts):
            raise ValueError(f"'{genre}' has not been learned, only {sorted(self.experts)}")
        if genre is not None:
            return log_probabilities(self.model, documents, self.experts[genre])
        each = [log_probabilities(self.model, documents, expert_id) for expert_id in self.experts.values()]
        return [mix_by_evidence(torch.stack(of_document)) for of_document in zip(*each, strict=True)]

    @property
    def num_parameters(self) -> int:
        """All that is kept, frozen or not."""
        return count_parameters(self.model).total


def mix_by_evidence(log_probs: Tensor) -> Tensor:
    """log sum_e p(e | before) p_e(x_t | before), where p(e | before) starts equal and follows Bayes' rule.

    Args:
        log_probs: (E, T) of each expert for the tokens that came.
    Returns:
        (T,) float32.
    """
    wide = log_probs.double()
    before = wide.cumsum(1) - wide
    return (torch.logsumexp(before + wide, 0) - torch.logsumexp(before, 0)).float()


def relative_rise(before: float, after: float) -> float:
    """By what share the perplexity of losses (nats) has risen: exp(after - before) - 1."""
    return math.expm1(after - before)
