"""DEMix: an expert for each domain, and a mixture of them where the domain is not known."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modmoe.gating.base import Router, at_least_float32, require_served
from modmoe.gating.ids import BY_ID, refuse_non_finite, write_row
from modmoe.growable import Init, RowSpec
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Rows

UNKNOWN = -1
MIN_PRIOR = 1e-6  # a prior of 0 could never rise again
ELSEWHERE = -1e30  # the score of other domains' experts: finite, and exp of it is exactly 0


class DomainRouter(Router):
    """A known domain d uses its own experts with equal weights; an unknown one mixes experts by their posterior.

    p(e | history) = softmax_e(log p(history | e) + log prior_e)

    ``ids`` name each token's domain, -1 where it is unknown; in evaluation they may be left out altogether. The
    log-likelihood of what came before comes from the caller, who has run the model with each domain's id:

        with router.evidence(log_likelihood):
            y = layer(x)

    Without it the prior alone decides. An expert serves the domain that is its own stable id, until
    :meth:`assign_domain` says otherwise; several may serve one domain. The prior starts equal. In evaluation
    ``layer.update_router()`` moves the prior of the live experts by one step of a moving average of the posterior;
    that of frozen experts stays as it is. Experts that are added start with the average share.

    Args:
        in_features: D.
        decay: how much of the prior one update keeps.
    Raises:
        ValueError: if decay is not in [0, 1); in a call, if a token's domain has no open expert.
    Source:
        Gururangan et al. 2021 (DEMix), section 5: mixing by a posterior, with uniform, updating and cached priors.
        Their posterior is that of domains; here it is that of experts, which is the same with one expert a domain.
    """

    needs_ids = "domain"

    def __init__(self, in_features: int, decay: float = 0.9):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.in_features = in_features
        self.decay = decay
        self._log_likelihood: Tensor | None = None

    def row_specs(self) -> dict[str, RowSpec]:
        return {
            "domain": RowSpec((), Init("constant", value=BY_ID), trainable=False, dtype=torch.int64),
            "prior": RowSpec((), Init("constant", value=1.0), trainable=False),
        }

    @property
    def weight_sum(self) -> str:
        return "1"

    def num_active(self, num_experts: int) -> int:
        """Of an unknown domain's token; a known domain uses its own experts only."""
        return num_experts

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None:
            raise ValueError("the posterior mixes all experts: there is no top_k")

    def check_ids(self, ids: Tensor | None, num_tokens: int) -> None:
        """As in any router that needs ids, but none are needed in evaluation."""
        if ids is not None or self.training:
            super().check_ids(ids, num_tokens)

    def assign_domain(self, pool: ExpertPool, namespace: str, expert_id: int, domain: int) -> None:
        """Let a live expert serve a domain.

        Raises:
            ValueError: on a negative domain, an unknown or a frozen expert.
        """
        if domain < 0:
            raise ValueError(f"a domain is at least 0, got {domain}")
        write_row(pool, namespace, "domain", expert_id, domain)

    @contextmanager
    def evidence(self, log_likelihood: Tensor) -> Iterator[None]:
        """Within this block, tokens of unknown domains are routed by the posterior given a history.

        Args:
            log_likelihood: log p(history | e) for each sequence (B, E), or for each token (T, E), experts in pool
                order. A token's history is what comes before it: then routing is causal.
        """
        before, self._log_likelihood = self._log_likelihood, log_likelihood
        try:
            yield
        finally:
            self._log_likelihood = before

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return self.scores(x, rows, None)

    def scores(self, x: Tensor, rows: Rows, ids: Tensor | None) -> Tensor:
        num_tokens, num_experts = x.shape[0], len(rows.ids)
        given = self._log_likelihood
        scores = at_least_float32(rows["prior"]).log().expand(num_tokens, num_experts)
        if given is not None:
            if given.dim() != 2 or given.shape[1] != num_experts or num_tokens % max(len(given), 1):
                raise ValueError(
                    f"a log-likelihood (B, {num_experts}) for equal parts of {num_tokens} tokens is needed, "
                    f"got {tuple(given.shape)}"
                )
            scores = scores + at_least_float32(given).repeat_interleave(num_tokens // max(len(given), 1), 0)
        if ids is not None:
            own = torch.tensor(rows.ids, device=x.device)
            domains = torch.where(rows["domain"] == BY_ID, own, rows["domain"])
            known = torch.where(domains == ids.unsqueeze(1), 0.0, ELSEWHERE)
            scores = torch.where((ids == UNKNOWN).unsqueeze(1), scores, known.to(scores.dtype))
        return refuse_non_finite(x, scores)

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        require_served(logits.amax(1) > ELSEWHERE, "the domain has no open expert")
        probs = logits.softmax(1)
        weights, choices = probs.sort(dim=1, descending=True, stable=True)
        return choices, weights, probs

    def declined(self, weights: Tensor, allowed: Tensor | None, rows: Rows) -> Tensor:
        return weights == 0  # no expert of another domain computes anything

    def update(self, pool: ExpertPool, namespace: str, routing: Routing) -> None:
        """Move the live experts' prior towards the mean posterior of the real tokens; in evaluation only."""
        probs = routing.probs.detach() if routing.mask is None else routing.probs.detach()[routing.mask]
        if self.training or not len(probs):
            return
        share = probs.mean(0) * len(pool.ids)  # 1 is the average share, and what a new expert starts with
        prior = pool.namespace(namespace)["prior"]
        for position, expert_id in enumerate(pool.ids):
            if expert_id not in pool.frozen_ids:
                moved = self.decay * float(prior[position]) + (1 - self.decay) * float(share[position])
                write_row(pool, namespace, "prior", expert_id, max(moved, MIN_PRIOR))
