"""Sets of points in, codes out: the features of each point, their weighted mean, and attention from targets.

Nothing here depends on the order of the points, nor on points that are masked.
"""

import math

import torch
from torch import Tensor, nn

MIN_MASS = 0.1  # below this weight a mean shrinks towards 0, so that a slot without points has a code: 0


class PointEncoder(nn.Module):
    """Each point by itself: an MLP of three layers on (x_i, y_i).

    Args:
        in_features: D.
        out_features: M.
        hidden_features: H.
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features + out_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, hidden_features),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, C, D) and (B, C, M) -> (B, C, H)."""
        return self.layers(torch.cat([x, y], -1))


def pool_points(features: Tensor, weights: Tensor) -> Tensor:
    """K codes of a set: weighted means, and how much weight each has.

    r_k = sum_i w_ik h_i / m_k with m_k = sum_i w_ik (at least 0.1), followed by the number (1 + m_k)^(-1/2): the scale
    of a posterior after m_k points, 1 for none, and bounded for sets larger than any seen in training.

    Args:
        features: (B, C, H), finite where the weight is 0, too. C may be 0.
        weights: (B, C, K), >= 0.
    Returns:
        (K, B, H + 1); 0, ..., 0, 1 for an empty set.
    """
    mass = weights.sum(1).t().unsqueeze(2)  # (K, B, 1)
    means = torch.einsum("bck,bch->kbh", weights, features) / mass.clamp(min=MIN_MASS)
    return torch.cat([means, (1 + mass).rsqrt()], 2)


class CrossAttention(nn.Module):
    """What each target reads from the context: multi-head attention with queries and keys from x.

    A learned point that is always there takes the weight when the context is empty. The softmax is written out:
    torch's fused attention has no second derivative.

    Args:
        in_features: D.
        hidden_features: H.
        num_heads: divides H.
    Raises:
        ValueError: if the heads do not divide H.
    Source:
        Attentive neural processes, Kim et al. 2019, section 3; the learned point is ours.
    """

    def __init__(self, in_features: int, hidden_features: int, num_heads: int = 4):
        super().__init__()
        if num_heads < 1 or hidden_features % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {hidden_features} features")
        self.num_heads = num_heads
        self.place = nn.Sequential(  # queries and keys alike: x near x' attend to each other from the start
            nn.Linear(in_features, hidden_features), nn.ReLU(), nn.Linear(hidden_features, hidden_features)
        )
        self.value = nn.Linear(hidden_features, hidden_features)
        self.out = nn.Linear(hidden_features, hidden_features)
        self.null_key = nn.Parameter(torch.zeros(hidden_features))
        self.null_value = nn.Parameter(torch.zeros(hidden_features))

    def forward(self, target_x: Tensor, context_x: Tensor, features: Tensor, present: Tensor) -> Tensor:
        """Read.

        Args:
            target_x: (B, N, D).
            context_x: (B, C, D), finite.
            features: (B, C, H) of the context points.
            present: (B, C) bool.
        Returns:
            (B, N, H).
        """
        queries = self._heads(self.place(target_x))
        keys = self._heads(self._with_null(self.place(context_x), self.null_key))
        values = self._heads(self._with_null(self.value(features), self.null_value))
        logits = queries @ keys.mT / math.sqrt(queries.shape[-1])
        seen = torch.cat([present.new_ones(len(present), 1), present], 1)
        weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        return self.out((weights @ values).transpose(1, 2).flatten(2))

    def _heads(self, values: Tensor) -> Tensor:
        """(B, P, H) -> (B, heads, P, H / heads)."""
        return values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _with_null(values: Tensor, null: Tensor) -> Tensor:
        return torch.cat([null.expand(len(values), 1, -1), values], 1)
