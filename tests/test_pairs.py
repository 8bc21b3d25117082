"""The contract of every supported pair of router and expert kind, on a grown and partly frozen pool.

The pairs are those of ``modmoe gates``. The last axis before the features is a sequence, of which there are two.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from modmoe import (
    DomainRouter,
    Expert,
    ExpertPool,
    MergedRouting,
    MoAttention,
    MoELayer,
    Router,
    SlotRouting,
)
from modmoe.attention import why_not_causal
from modmoe.catalog import example_experts, example_routers, layer_class, why_not
from modmoe.gating import FittedRouter
from modmoe.kernels.reference import run_reference

D, B, S = 16, 2, 8
CAUSAL = "attention, causal"

KINDS = {**example_experts(D), CAUSAL: example_experts(D)["attention"]}
ALL = [(gate, kind) for gate in example_routers(D) for kind in KINDS]


def reason(gate: str, kind: str) -> str | None:
    router = example_routers(D)[gate]
    return why_not(router, KINDS[kind]) or (why_not_causal(router) if kind == CAUSAL else None)


PAIRS = [pair for pair in ALL if reason(*pair) is None]
OTHERS = [pair for pair in ALL if reason(*pair) is not None]

by_pair = pytest.mark.parametrize(("gate", "kind"), PAIRS)


def assemble(gate: str, kind: str, num_experts: int) -> MoELayer:
    router, pool = example_routers(D)[gate], ExpertPool(KINDS[kind], num_experts)
    if kind == CAUSAL:
        return MoAttention(pool, router, causal=True)
    return layer_class(pool.expert)(pool, router)


def observe(layer: MoELayer, expert_id: int) -> None:
    """Fit a gate to data of the expert: two classes, 5 expert_id away from the first one's."""
    if isinstance(layer.router, FittedRouter):
        generator = torch.Generator().manual_seed(expert_id)
        labels = 2 * expert_id + torch.arange(2).repeat_interleave(20)
        centres = torch.eye(D)[:, :8].T * 5
        layer.observe(expert_id, centres[labels] + torch.randn(40, D, generator=generator), labels)


def draw_live(layer: MoELayer) -> None:
    """Draw every live row anew, so that no expert's output and no gate's noise is zero; no softmax is saturated."""
    for namespace, rows in layer.pool.rows.items():
        for parameter in rows.parameters():
            nn.init.normal_(parameter, std=0.5 if namespace == "expert" else 0.1)


def grown(gate: str, kind: str) -> MoELayer:
    """Experts 0, 1 (frozen), 2 and 3 (added later, live), in evaluation."""
    torch.manual_seed(0)
    layer = assemble(gate, kind, 2)
    draw_live(layer)
    for expert_id in range(2):
        observe(layer, expert_id)
    layer.freeze([0, 1])
    for expert_id in range(2, 4):
        layer.add_experts(1)
        observe(layer, expert_id)
    draw_live(layer)
    return layer.eval()


def tokens(seed: int = 0, length: int = S) -> Tensor:
    """(B, S, D), spread like the data of the fitted gates: every expert's classes occur."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (B, length), generator=generator)
    return 5 * torch.eye(D)[labels] + torch.randn(B, length, D, generator=generator)


def ids_of(router: Router, x: Tensor) -> Tensor | None:
    """Ids (...) that follow from x: token ids in both groups, or domains 0 to 3 (experts' own)."""
    if router.needs_ids is None:
        return None
    ids = (1e3 * x[..., 0].nan_to_num().abs()).long()
    return ids % 4 if isinstance(router, DomainRouter) else ids % 2000


def run(layer: MoELayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return layer(x, mask, ids=ids_of(layer.router, x))


@torch.no_grad()
def by_loops(layer: MoELayer, x: Tensor) -> Tensor:
    """The layer's output from its last routing, token by token and expert by expert."""
    routing, ids = layer.routing, layer.pool.ids
    assert routing is not None
    y = torch.zeros_like(x)
    if isinstance(routing, SlotRouting):
        for b, e, p in torch.cartesian_prod(*map(torch.arange, (B, layer.pool.num_experts, layer.router.slots))):
            slot = sum(routing.dispatch[b, s, e, p] * x[b, s] for s in range(x.shape[1]))
            output = layer.expert_output(ids[e], slot)
            for s in range(x.shape[1]):
                y[b, s] += routing.combine[b, s, e, p] * output
        return y
    if isinstance(routing, MergedRouting):
        experts = [layer.pool.namespace("expert", [expert_id]) for expert_id in ids]
        for t, merge in enumerate(routing.merge_index):
            weights = routing.merge_weight[merge]
            rows = {name: sum(w * rows[name] for w, rows in zip(weights, experts, strict=True)) for name in experts[0]}
            token = x.view(-1, D)[t : t + 1]
            y.view(-1, D)[t] = run_reference(layer.pool.expert, rows, token, torch.zeros(1, dtype=torch.int64))[0]
        return y
    outputs = [layer.expert_output(expert_id, x).view(-1, D) for expert_id in ids]
    for t, e, w in zip(routing.token_index, routing.expert_index, routing.weight, strict=True):
        if e >= 0:
            y.view(-1, D)[t] += w * outputs[e][t]
    return y


@pytest.mark.parametrize(("gate", "kind"), OTHERS)
def test_pairs_that_make_no_sense_raise_when_the_layer_is_built(gate: str, kind: str):
    with pytest.raises(ValueError, match=r"heads need the same number of choices|causal attention needs a causal"):
        assemble(gate, kind, 2)


def test_every_kind_makes_some_pair_and_not_all_do():
    assert {kind for _, kind in PAIRS} == set(KINDS)
    assert {gate for gate, _ in PAIRS} == set(example_routers(D))
    assert {kind for _, kind in OTHERS} == {"attention", CAUSAL}


def test_a_head_outside_of_attention_is_refused():
    pool = ExpertPool(KINDS["attention"])
    with pytest.raises(ValueError, match="use MoAttention"):
        MoELayer(pool, example_routers(D)["dense"])


@by_pair
def test_it_equals_a_plain_loop(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    y = run(layer, x)
    assert_close(y, by_loops(layer, x), atol=1e-5, rtol=1e-4)
    assert y.abs().max() > 1e-3


@by_pair
def test_evaluation_is_deterministic_and_changes_nothing(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(run(layer, x), run(layer, x))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


@by_pair
def test_weights_add_up_to_what_is_declared(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    for training in (False, True):
        layer.train(training)
        run(layer, x)
        assert layer.routing is not None
        total = layer.routing.matrix().sum(1)
        assert layer.routing.weight.min() >= 0
        if layer.router.weight_sum == "1":
            assert_close(total, torch.ones_like(total))
        elif layer.router.weight_sum == "<= 1":
            assert total.max() <= 1 + 1e-6
        else:
            assert layer.router.weight_sum == "any"
            assert (total - 1).abs().max() > 0.1


@by_pair
def test_every_trainable_part_gets_a_gradient_and_no_frozen_one(gate: str, kind: str):
    layer = grown(gate, kind).train()
    x = tokens(length=40)
    torch.manual_seed(1)  # for those that draw
    target = torch.randn(B, 40, D)
    (run(layer, x) * target).mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    expected = any(spec.trainable for spec in layer.router.row_specs().values())
    assert any(True for _ in layer.pool.rows[layer.namespace].parameters()) == expected


@by_pair
def test_padding_changes_no_real_token(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    keep = torch.tensor([0, 1, 3, 4, 5, 7])
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[:, keep] = True
    expected = run(layer, x[:, keep])
    for garbage in (0.0, 100.0, torch.nan):
        padded = torch.where(mask.unsqueeze(2), x, torch.full_like(x, garbage))
        y = run(layer, padded, mask)
        assert_close(y[:, keep], expected, atol=1e-5, rtol=1e-4)
        assert y[~mask].abs().max() == 0


@by_pair
def test_later_tokens_matter_just_where_it_says_so(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()[:1]
    x[:, 2 : S // 2] = x[:, 1:2]  # alike: one expert's capacity has no room for all of them
    layer.train(not layer.router.stochastic)  # as far as that is not at random
    causal = layer.router.causal and (kind != "attention")  # without a mask, heads see the whole sequence
    before, earlier, moved = run(layer, x).detach(), S // 2, 0.0
    for seed in range(10):
        changed = x.clone()
        changed[:, earlier:] = tokens(seed + 1)[:1, earlier:]
        for y in (run(layer, changed), run(layer, changed[:, : S - 1 - seed % 3])):
            moved = max(moved, float((y.detach() - before[:, : y.shape[1]])[:, :earlier].abs().max()))
    size = float(before.abs().max())
    if causal:
        assert moved <= 1e-5 * size
    else:
        assert moved > 1e-3 * size


@by_pair
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(gate: str, kind: str, num_tokens: int):
    layer, x = grown(gate, kind), tokens()[:1, :num_tokens]
    for training in (False, True):
        layer.train(training)
        y = run(layer, x)
        assert y.shape == (1, num_tokens, D)
        assert y.isfinite().all()
        (y.sum() + 0 * sum(p.sum() for p in layer.parameters())).backward()


@by_pair
def test_an_expert_that_nobody_chooses_is_no_error(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    ids = ids_of(layer.router, x)
    if isinstance(layer.router, DomainRouter):
        ids = torch.where(ids == 1, 0, ids)  # this domain's expert is closed below
    y = layer(x, ids=ids, expert_mask=torch.tensor([True, False, True, True]))
    assert layer.routing is not None
    assert layer.routing.load[1] == 0
    assert_close(y, by_loops(layer, x), atol=1e-5, rtol=1e-4)


@by_pair
def test_growth_and_loading(gate: str, kind: str):
    layer, x = grown(gate, kind), tokens()
    frozen = {i: layer.pool.expert_state(i) for i in layer.pool.frozen_ids}
    open_before = torch.arange(4) < 4
    before = run(layer, x)
    layer.freeze([2])
    layer.add_experts(2)
    mask = torch.cat([open_before, torch.tensor([False, False])])
    if not (layer.router.capacity or gate in ("expert_choice", "base")):  # their limits count closed experts, too
        y = layer(x, ids=ids_of(layer.router, x), expert_mask=mask)
        assert_close(y, before, atol=1e-5, rtol=1e-4)
    for expert_id, rows in frozen.items():
        assert all(torch.equal(layer.pool.expert_state(expert_id)[name], row) for name, row in rows.items())
    loaded = assemble(gate, kind, 2).eval()
    loaded.load_state_dict(layer.state_dict())
    assert loaded.pool.ids == (0, 1, 2, 3, 4, 5)
    assert loaded.pool.frozen_ids == (0, 1, 2)
    assert torch.equal(run(loaded, x), run(layer, x))


def test_the_kinds_are_all_there():
    """An expert kind that is exported stands in the catalogue."""
    import modmoe

    exported = {c for name in modmoe.__all__ if isinstance(c := getattr(modmoe, name), type) and issubclass(c, Expert)}
    assert exported - {Expert} == {type(kind) for kind in KINDS.values()}
