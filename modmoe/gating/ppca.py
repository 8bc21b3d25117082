"""A mixture of probabilistic principal component analysers for each class."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modmoe.gating.classwise import DensityRouter
from modmoe.gating.fitted import class_generator
from modmoe.growable import RowSpec
from modmoe.rows import Rows

OVERSAMPLING = 10  # columns beyond the rank in the subspace iteration
POWER_STEPS = 6
KMEANS_STEPS = 8


class PPCARouter(DensityRouter):
    """s_c(x) = log sum_k pi_k N(x; m_k, W_k W_k^T + v_k I), for each class c on its own.

    Every W_k is (D, rank); kept are its directions U (orthonormal columns) and the variances l along them, so that
    W = U (diag(l) - v I)^(1/2), and

    log N(x) = -1/2 [D log 2 pi + sum log l + (D - rank) log v + sum (U^T d)^2 / l + (|d|^2 - |U^T d|^2) / v],
    d = x - m.

    Fitted by hard EM from k-means, with the leading subspace of each component found by subspace iteration. Scores
    are raw likelihoods, never calibrated. A class with few samples gets fewer components (one for each 2 * rank
    samples, at least one), and a component with n samples at most n // 2 variances above v: v is estimated from the
    other half of its spectrum.

    Args:
        in_features: D.
        components: K, the most components of a class.
        rank: directions of a component; clamped to D.
        noise_floor: added to the variance in every direction, in squared units of the features; fixed before the
            stream.
        iterations: of EM.
        seed: of k-means and the subspace iteration; no global random state is used.
        top_k: see FittedRouter.
    Raises:
        ValueError: if components, rank or iterations is below 1, or noise_floor not positive.
    Source:
        Tipping & Bishop 1999, Mixtures of probabilistic principal component analysers (here with hard assignments);
        Halko et al. 2011 for the subspace iteration.
    """

    streaming = False

    def __init__(
        self,
        in_features: int,
        components: int = 10,
        rank: int = 25,
        noise_floor: float = 0.002,
        iterations: int = 4,
        seed: int = 0,
        top_k: int = 1,
    ):
        super().__init__(in_features, top_k=top_k)
        if components < 1 or rank < 1 or iterations < 1:
            raise ValueError(
                f"components, rank and iterations must be at least 1, got {components}, {rank} and {iterations}"
            )
        if noise_floor <= 0:
            raise ValueError(f"noise_floor must be positive, got {noise_floor}")
        self.components = components
        self.rank = min(rank, in_features)
        self.noise_floor = noise_floor
        self.iterations = iterations
        self.seed = seed

    def row_specs(self) -> dict[str, RowSpec]:
        K, D, q = self.components, self.in_features, self.rank
        return {
            **super().row_specs(),
            "log_weight": RowSpec((K,), trainable=False, count=0),  # log pi_k, -inf where a component is unused
            "mean": RowSpec((K, D), trainable=False, count=0),
            "directions": RowSpec((K, D, q), trainable=False, count=0),  # U
            "variances": RowSpec((K, q), trainable=False, count=0),  # l
            "noise": RowSpec((K,), trainable=False, count=0),  # v
        }

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        names = ("log_weight", "mean", "directions", "variances", "noise")
        # class by class: no bit of a frozen class's score may depend on the size of the pool
        mixtures = zip(*(rows[name].to(x.dtype) for name in names), strict=True)
        scores = [component_scores(x, *mixture).logsumexp(1) for mixture in mixtures]
        return torch.stack(scores, 1) if scores else x.new_zeros(len(x), 0)

    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        assert old is None
        generator = class_generator(self.seed, label)
        num_components = max(1, min(self.components, len(x) // (2 * self.rank)))
        mixture = {name: self._unused(name, x) for name in self.row_specs() if name not in ("label", "count")}
        nearest = assign_by_kmeans(x, num_components, generator)
        for step in range(self.iterations):
            if step > 0:
                nearest = component_scores(x, **mixture)[:, :num_components].argmax(1)
            for k in range(num_components):
                members = x[nearest == k]
                share = len(members) / len(x)
                if len(members) < min(self.rank + 5, len(x)):  # too few for a subspace: others of the class join
                    others = torch.randperm(len(x), generator=generator)[: 2 * self.rank].to(x.device)
                    members = torch.cat([members, x[others]])
                values = self._fit_component(members, generator)
                values["log_weight"] = x.new_tensor(math.log(share) if share else -math.inf)
                for name, value in values.items():
                    mixture[name][k] = value
        return {"count": x.new_tensor(len(x)), **mixture}

    def sample(self, row: Mapping[str, Tensor], n: int, generator: torch.Generator) -> Tensor:
        mean = row["mean"]
        weight = row["log_weight"].exp().cpu()
        component = torch.multinomial(weight, n, replacement=True, generator=generator) if n else weight.new_zeros(0)
        along = torch.randn(n, self.rank, generator=generator).to(mean)
        noise = torch.randn(n, self.in_features, generator=generator).to(mean)
        x = mean.new_empty(n, self.in_features)
        for k in component.unique().tolist():
            mine = (component == k).to(mean.device)
            directions, spread = row["directions"][k], row["variances"][k].sqrt()
            # the noise is that of the other directions only: along the kept ones the variances are all there is
            rest = noise[mine] - (noise[mine] @ directions) @ directions.T
            x[mine] = mean[k] + (along[mine] * spread) @ directions.T + row["noise"][k].sqrt() * rest
        return x

    def _unused(self, name: str, like: Tensor) -> Tensor:
        shape = [int(size) for size in self.row_specs()[name].shape]
        value = {"log_weight": -math.inf, "variances": 1.0, "noise": 1.0}.get(name, 0.0)
        return like.new_full(shape, value)

    def _fit_component(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The most likely mean, directions, variances and noise for x (n, D), but for log_weight."""
        n, D = x.shape
        mean = x.mean(0)
        centred = x - mean
        values, directions = leading_subspace(centred, self.rank, generator)
        kept = min(self.rank, n // 2)
        total = centred.square().sum() / n
        # what is left of the variance, spread over what is left of the directions
        noise = (total - values[:kept].sum()).clamp(min=0) / max(D - kept, 1) + self.noise_floor
        variances = torch.cat([values[:kept] + self.noise_floor, noise.repeat(self.rank - kept)])
        return {"mean": mean, "directions": directions, "variances": variances, "noise": noise}


def component_scores(
    x: Tensor, log_weight: Tensor, mean: Tensor, directions: Tensor, variances: Tensor, noise: Tensor
) -> Tensor:
    """(T, K) log pi_k + log N(x; m_k, W_k W_k^T + v_k I) of one class, see PPCARouter for the names."""
    num_components, D, rank = directions.shape
    scores = []
    for k in range(num_components):
        centred = x - mean[k]
        along = (centred @ directions[k]).square()
        # at most (D - rank) directions are left: none where rank = D, whatever rounding says
        rest = (centred.square().sum(1) - along.sum(1)).clamp(min=0) if rank < D else torch.zeros_like(x[:, 0])
        log_det = variances[k].log().sum() + (D - rank) * noise[k].log()
        quadratic = (along / variances[k]).sum(1) + rest / noise[k]
        scores.append(log_weight[k] - 0.5 * (D * math.log(2 * math.pi) + log_det + quadratic))
    return torch.stack(scores, 1)


def leading_subspace(centred: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of X^T X / n and their eigenvectors, by subspace iteration; exact for small D.

    Args:
        centred: X (n, D).
        rank: at most D.
        generator: of the start, on the CPU.
    Returns:
        (rank,) in descending order, (D, rank) orthonormal.
    """
    n, D = centred.shape
    width = min(D, rank + OVERSAMPLING)
    basis = torch.randn(D, width, generator=generator).to(centred)
    basis = torch.linalg.qr(basis).Q
    for _ in range(POWER_STEPS if width < D else 0):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    projected = centred @ basis
    values, vectors = torch.linalg.eigh(projected.T @ projected / n)
    order = torch.arange(width - 1, width - 1 - rank, -1, device=centred.device)
    return values[order].clamp(min=0), basis @ vectors[:, order]


def assign_by_kmeans(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """(n,) int64: the cluster of each row of x (n, D), by Lloyd's algorithm from k-means++.

    An empty cluster starts again at the row that is farthest from its centre.
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < num_clusters:
        # the tiny constant is for rows that are all equal
        chosen.append(int(torch.multinomial(distance.cpu() + 1e-30, 1, generator=generator)))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    centres = x[chosen]
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(KMEANS_STEPS):
        sums = torch.zeros_like(centres).index_add(0, nearest, x)
        sizes = nearest.bincount(minlength=num_clusters)
        centres = sums / sizes.clamp(min=1).unsqueeze(1)
        empty = (sizes == 0).nonzero().squeeze(1)
        if len(empty):
            far = (x - centres[nearest]).square().sum(1).argsort(descending=True)
            centres[empty] = x[far[: len(empty)]]
        nearest = torch.cdist(x, centres).argmin(1)
    return nearest
