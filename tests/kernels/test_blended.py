"""Slots and merged experts against plain loops: outputs and every gradient, by hand, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from modmoe import (
    ConvExpert,
    DenseRouter,
    ExpertPool,
    LoryRouter,
    MergedRouting,
    MLPExpert,
    MoELayer,
    SlotRouting,
    SmearRouter,
    SoftRouter,
)
from modmoe.kernels.blended import merge_rows, run_merged, run_slots
from modmoe.kernels.reference import run_reference
from modmoe.kernels.select import CPU_BACKENDS


def pool_of(freeze: tuple[int, ...] = (), wider: bool = False, dtype: torch.dtype = torch.float32) -> ExpertPool:
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(4, 6, 3), 3)
    pool.add_experts(1, **({"hidden_features": 7} if wider else {}))
    pool.freeze(freeze)
    return pool.to(dtype)


def triples(num_tokens: int, num_experts: int) -> dict:
    """Flat triples that no kernel here reads."""
    return {
        "token_index": torch.zeros(0, dtype=torch.int64),
        "expert_index": torch.zeros(0, dtype=torch.int64),
        "weight": torch.zeros(0),
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "logits": torch.zeros(num_tokens, num_experts),
        "probs": torch.zeros(num_tokens, num_experts),
    }


def slot_routing(dispatch: Tensor, combine: Tensor) -> SlotRouting:
    num_sequences, length, num_experts, _ = dispatch.shape
    return SlotRouting(**triples(num_sequences * length, num_experts), dispatch=dispatch, combine=combine)


def merged_routing(weight: Tensor, index: Tensor) -> MergedRouting:
    return MergedRouting(**triples(len(index), weight.shape[1]), merge_weight=weight, merge_index=index)


def one_expert(pool: ExpertPool, position: int, x: Tensor) -> Tensor:
    rows = pool.namespace("expert", [pool.ids[position]])
    return run_reference(pool.expert, dict(rows), x, torch.zeros(len(x), dtype=torch.int64))


def slots_by_loop(pool: ExpertPool, x: Tensor, routing: SlotRouting) -> Tensor:
    num_sequences, length, num_experts, num_slots = routing.dispatch.shape
    y = []
    for b in range(num_sequences):
        tokens = x[b * length : (b + 1) * length]
        outputs = torch.zeros(length, pool.expert.out_features, dtype=x.dtype)
        for e in range(num_experts):
            for p in range(num_slots):
                mixture = (routing.dispatch[b, :, e, p].unsqueeze(1) * tokens).sum(0, keepdim=True)
                outputs = outputs + routing.combine[b, :, e, p].unsqueeze(1) * one_expert(pool, e, mixture)
        y.append(outputs)
    return torch.cat(y)


def merged_by_loop(pool: ExpertPool, x: Tensor, routing: MergedRouting) -> Tensor:
    rows = pool.namespace("expert")
    y = []
    for t, m in enumerate(routing.merge_index.tolist()):
        if m < 0:
            y.append(torch.zeros(pool.expert.out_features, dtype=x.dtype))
            continue
        theta = {
            name: sum(w * row for w, row in zip(routing.merge_weight[m], rows[name], strict=True)) for name in rows
        }
        y.append(F.gelu(x[t] @ theta["w_in"] + theta["b_in"]) @ theta["w_out"] + theta["b_out"])
    return torch.stack(y)


def random_slots(x_dtype: torch.dtype = torch.float32) -> SlotRouting:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.rand(2, 3, 4, 2, generator=generator, dtype=x_dtype) for _ in range(2)]
    return slot_routing(draw[0].requires_grad_(), draw[1].requires_grad_())


def random_merges(x_dtype: torch.dtype = torch.float32) -> MergedRouting:
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=x_dtype)
    return merged_routing(weight.requires_grad_(), torch.tensor([0, 2, -1, 2, 0, 2]))  # merge 1 has no token


def gradients(y: Tensor, pool: ExpertPool, *others: Tensor) -> list[Tensor]:
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * direction).sum(), [*others, *pool.parameters()]))


# -- by hand -----------------------------------------------------------------------------------------------------------


def scale_experts() -> ExpertPool:
    """Two experts on one feature: f_0(x) = 2 relu(x) and f_1(x) = 3 relu(x) + 1."""
    pool = ExpertPool(MLPExpert(1, 1, activation="relu"), 2)
    values = {"w_in": [1.0, 1.0], "b_in": [0.0, 0.0], "w_out": [2.0, 3.0], "b_out": [0.0, 1.0]}
    with torch.no_grad():
        for name, value in values.items():
            rows = pool.growable("expert", name).banks()[0][0]
            rows.copy_(torch.tensor(value).view_as(rows))
    return pool


def test_slots_by_hand():
    pool = scale_experts()
    dispatch = torch.tensor([[[[0.5], [1.0]], [[0.5], [0.0]]]])  # (1, 2 tokens, 2 experts, 1 slot)
    combine = torch.tensor([[[[1.0], [0.0]], [[0.25], [0.75]]]])
    y = run_slots(torch.tensor([[2.0], [6.0]]), pool.groups(), pool.expert, slot_routing(dispatch, combine))
    # slots: (2 + 6) / 2 = 4 and 2; outputs 2 * 4 = 8 and 3 * 2 + 1 = 7; 8 and .25 * 8 + .75 * 7 = 7.25
    assert y.tolist() == [[8.0], [7.25]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_merge_by_hand(backend):
    pool = scale_experts()
    routing = merged_routing(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, -1, 1]))
    y = run_merged(torch.tensor([[2.0], [9.0], [2.0]]), pool.groups(), pool.expert, routing, backend)
    # halves: w_out (2 + 3) / 2 = 2.5, b_out .5: 2.5 * 2 + .5 = 5.5; padding 0; expert 1 alone 3 * 2 + 1 = 7
    assert y.tolist() == [[5.5], [0.0], [7.0]]


def test_merged_weights_are_the_mixture_of_outputs_only_for_linear_experts():
    pool = scale_experts()
    merged = merge_rows(pool.groups(), torch.tensor([[0.5, 0.5]]))
    assert [merged[name].item() for name in ("w_in", "b_in", "w_out", "b_out")] == [1.0, 0.0, 2.5, 0.5]
    # w_in is the same in both, so that the merge is linear in what differs: (4 + 7) / 2 = 5.5, as above.
    with torch.no_grad():
        rows = pool.growable("expert", "w_in").banks()[0][0]
        rows[1] = -1.0
    routing = merged_routing(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    y = run_merged(torch.tensor([[2.0]]), pool.groups(), pool.expert, routing)
    # now w_in = (1 - 1) / 2 = 0: y = .5; the outputs are 4 and 1, their mixture 2.5
    assert y.tolist() == [[0.5]]


# -- against the loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [(), (1,), (0, 1, 2)])
def test_slots_equal_a_loop(freeze):
    pool, routing = pool_of(freeze, wider=True), random_slots()
    x = torch.randn(6, 4, requires_grad=True)
    y, expected = run_slots(x, pool.groups(), pool.expert, routing), slots_by_loop(pool, x, routing)
    assert_close(y, expected, atol=1e-6, rtol=1e-5)
    others = (x, routing.dispatch, routing.combine)
    for got, want in zip(gradients(y, pool, *others), gradients(expected, pool, *others), strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("freeze", [(), (1,), (0, 1, 2)])
def test_merges_equal_a_loop(freeze, backend):
    pool, routing = pool_of(freeze), random_merges()
    x = torch.randn(6, 4, requires_grad=True)
    y = run_merged(x, pool.groups(), pool.expert, routing, backend)
    expected = merged_by_loop(pool, x, routing)
    assert_close(y, expected, atol=1e-6, rtol=1e-5)
    others = (x, routing.merge_weight)
    for got, want in zip(gradients(y, pool, *others), gradients(expected, pool, *others), strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_in_float64():
    pool, slots, merges = pool_of((1,), dtype=torch.float64), random_slots(torch.float64), random_merges(torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def by_slots(x: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
        return run_slots(x, pool.groups(), pool.expert, slot_routing(dispatch, combine))

    def by_merges(x: Tensor, weight: Tensor) -> Tensor:
        return run_merged(x, pool.groups(), pool.expert, merged_routing(weight, merges.merge_index))

    assert gradcheck(by_slots, (x, slots.dispatch, slots.combine))
    assert gradcheck(by_merges, (x, merges.merge_weight))


def test_convolutions_can_be_mixed_and_merged():
    torch.manual_seed(0)
    pool = ExpertPool(ConvExpert((1, 3, 3), (2,), 2), 3)
    pool.freeze([0])
    x, slots = torch.randn(4, 9), slot_routing(torch.rand(1, 4, 3, 2), torch.rand(1, 4, 3, 2))
    assert_close(run_slots(x, pool.groups(), pool.expert, slots), slots_by_loop(pool, x, slots), atol=1e-6, rtol=1e-5)
    one = torch.eye(3)[[1, 0]]  # each merge is one expert
    y = run_merged(x, pool.groups(), pool.expert, merged_routing(one, torch.tensor([0, 1, 1, 0])))
    for t, position in enumerate([1, 0, 0, 1]):
        assert_close(y[t], one_expert(pool, position, x[t : t + 1])[0], atol=1e-6, rtol=1e-5)


# -- through the layer -------------------------------------------------------------------------------------------------

ROUTERS = {
    "soft": lambda: SoftRouter(4, 2),
    "smear": lambda: SmearRouter(4),
    "lory": lambda: LoryRouter(4, 2),
}


def layer_of(make, num_experts: int = 3) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(4, 6, 3), num_experts), make())


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_one_expert_is_a_dense_network_for_merges_and_mixed_input_for_slots(make):
    layer = layer_of(make, 1)
    x = torch.randn(2, 3, 4)
    if isinstance(layer.router, SoftRouter):
        x = x[:, :1].expand(2, 3, 4)  # equal tokens: every mixture of them is the token
    assert_close(layer(x), layer.expert_output(0, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_a_step_leaves_frozen_experts_alone(make):
    layer = layer_of(make)
    layer.freeze([0, 2])
    frozen = {expert_id: layer.pool.expert_state(expert_id) for expert_id in (0, 2)}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 5, 4)).square().sum().backward()
    optimizer.step()
    for expert_id, state in frozen.items():
        now = layer.pool.expert_state(expert_id)
        assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_saved_loaded_and_repeated(make):
    layer, x = layer_of(make).eval(), torch.randn(2, 5, 4)
    layer.freeze([1])
    layer.add_experts(1)
    loaded = layer_of(make, 1).eval()
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("make", [*ROUTERS.values(), lambda: DenseRouter(4)], ids=[*ROUTERS, "dense"])
def test_autocast_and_float64(make):
    layer, x = layer_of(make), torch.randn(2, 5, 4)
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), y, atol=0.05, rtol=0.05)
    assert_close(layer.double()(x.double()).float(), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_compiles_without_a_break(make):
    layer, x, mask = layer_of(make), torch.randn(2, 5, 4), torch.arange(10).view(2, 5) % 4 != 1
    layer.freeze([1])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, mask=mask), layer(x, mask=mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_a_toy_task_is_learned(make):
    layer = layer_of(make, 4)
    x = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(2))
    target = torch.stack([x.mean(1).sign()[:, :3]] * 4, 1)  # about the sequence as a whole
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = (layer(x)[:, 2:] - target[:, 2:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
