"""What growing costs: adding a cohort, and the first step after it."""

import statistics
import time

import torch
from kernel_arms import expert_parameters, make_layer
from kernel_cases import Case, routing_of
from torch import Tensor

from modmoe import MLPExpert, sync_optimizer

REPEATS = 5


def growth_rows(case: Case) -> list[dict]:
    """``grow_ms`` (``add_experts`` and ``sync_optimizer``) and ``first_step_ms`` of a case's last cohort.

    Before it the pool has trained for one step, so that the optimizer has moments to carry over.

    Args:
        case: with at least two cohorts, on a CPU.
    """
    tokens, d, h, experts, k = case.sizes
    size = experts // case.amount
    weight = torch.full((tokens * k,), 1 / k)
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    grown, first = [], []
    for _ in range(REPEATS):
        before = Case(f"{tokens},{d},{h},{experts - size},{k},cohorts{case.amount - 1}")
        layer = make_layer(before, MLPExpert(d, h))
        optimizer = torch.optim.AdamW(expert_parameters(layer), lr=1e-4)

        def step(choices: Tensor, num_experts: int, layer=layer, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            layer.mix(x, routing_of(choices, weight, num_experts)).backward(grad)
            optimizer.step()

        step(before.choices(), experts - size)
        choices = case.choices()
        start = time.process_time()
        layer.add_experts(size)
        sync_optimizer(optimizer, layer)
        middle = time.process_time()
        step(choices, experts)
        grown.append(middle - start)
        first.append(time.process_time() - middle)
        x.grad = None
    medians = {"grow_ms": statistics.median(grown), "first_step_ms": statistics.median(first)}
    return [{"case": case.name, "arm": "auto", "metric": name, "value": 1e3 * s} for name, s in medians.items()]
