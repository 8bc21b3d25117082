"""What every router of modmoe.gating keeps, whichever it is."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import modmoe.gating
from modmoe import (
    AttentionRouter,
    BaseAssignmentRouter,
    CosineRouter,
    DeepSeekV2Router,
    DeepSeekV3Router,
    DenseRouter,
    DomainRouter,
    ExpertChoiceRouter,
    ExpertPool,
    GaussianRouter,
    GroupedRandomRouter,
    GShardRouter,
    HashRouter,
    LoryRouter,
    MLPExpert,
    MoELayer,
    NoisyTopKRouter,
    NonFiniteError,
    PrototypeRouter,
    ReLURouter,
    Router,
    Routing,
    SmearRouter,
    SoftRouter,
    SwitchRouter,
    TopKRouter,
    VMoERouter,
)
from modmoe.gating.autoencoder import AutoencoderRouter
from modmoe.gating.learned import LearnedRouter
from modmoe.gating.ppca import PPCARouter
from modmoe.gating.stick import StickRouter

D = 6

ROUTERS: dict[str, Callable[[], Router]] = {
    "dense": lambda: DenseRouter(D),
    "top-1": lambda: TopKRouter(D, 1),
    "top-2": lambda: TopKRouter(D, 2),
    "top-2 of softmax": lambda: TopKRouter(D, 2, order="softmax_topk"),
    "gaussian": lambda: GaussianRouter(D),
    "gaussian per expert, top-2": lambda: GaussianRouter(D, per_class=False, top_k=2),
    "prototype": lambda: PrototypeRouter(D),
    "ppca": lambda: PPCARouter(D, components=2, rank=2),
    "ppca, top-2": lambda: PPCARouter(D, components=2, rank=2, top_k=2),
    "autoencoder": lambda: AutoencoderRouter(D, hidden_features=3, epochs=2),
    "stick": lambda: StickRouter(D, 8, ridge=1.0),
    "stick and density": lambda: StickRouter(
        D, 8, ridge=1.0, density=PPCARouter(2, components=1, rank=1), density_slice=(4, 6), top_k=2
    ),
    "learned": lambda: LearnedRouter(D, GaussianRouter(D), hidden_features=8, max_epochs=10),
    "learned, top-2": lambda: LearnedRouter(D, PPCARouter(D, components=1, rank=2), 8, max_epochs=5, top_k=2),
    "expert choice": lambda: ExpertChoiceRouter(D),
    "base": lambda: BaseAssignmentRouter(D),
    "hash": lambda: HashRouter(D),
    "domain": lambda: DomainRouter(D),
    "grouped random": lambda: GroupedRandomRouter(D, num_groups=2, vocab_size=1000),
    "soft": lambda: SoftRouter(D, slots=2),
    "smear": lambda: SmearRouter(D),
    "lory": lambda: LoryRouter(D, segment_length=2),
    "noisy top-1": lambda: NoisyTopKRouter(D, 1),
    "noisy top-2": lambda: NoisyTopKRouter(D, 2),
    "v-moe": lambda: VMoERouter(D, 2),
    "switch": lambda: SwitchRouter(D),
    "gshard": lambda: GShardRouter(D),
    "deepseek-v2": lambda: DeepSeekV2Router(D, 2, num_groups=2),
    "deepseek-v3": lambda: DeepSeekV3Router(D, 2, num_groups=3, top_groups=2),
    "deepseek-v3, one group of unequal two": lambda: DeepSeekV3Router(D, 2, num_groups=2, routed_scaling=2.5),
    "cosine": lambda: CosineRouter(D),
    "attention": lambda: AttentionRouter(D, 2),
    "relu": lambda: ReLURouter(D, 2),
}

DRAWS = (NoisyTopKRouter, VMoERouter, SwitchRouter, GShardRouter)  # at random, in training

pytestmark = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS.keys())


def data(num_experts: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), class labels and the expert of each row: two classes for each expert."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(40)
    centres = 3 * torch.randn(8, D, generator=generator)
    x = centres[labels] + torch.randn(len(labels), D, generator=generator)
    mine = labels // 2 < num_experts
    return x[mine], labels[mine], labels[mine] // 2


def observe(layer: MoELayer, expert_id: int) -> None:
    """Fit a gate that is fitted to data; a gate that is trained by gradient stays as it was drawn."""
    fit = getattr(layer.router, "observe", None)
    if fit is not None:
        x, labels, experts = data(4)
        mine = experts == expert_id
        fit(layer.pool, layer.namespace, expert_id, x[mine], labels[mine])


def layer_of(make: Callable[[], Router], seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(ExpertPool(MLPExpert(D, 4), 3), make())
    for expert_id in range(3):
        observe(layer, expert_id)
    if isinstance(layer.router, NoisyTopKRouter):  # its rows start at zero: nothing to tell tokens by
        for parameter in layer.pool.rows[layer.namespace].parameters():
            torch.nn.init.normal_(parameter)
    return layer


def quiet(layer: MoELayer) -> MoELayer:
    """The layer in a state in which it routes alike twice."""
    return layer.eval() if isinstance(layer.router, DRAWS) else layer


def ids_of(layer: MoELayer, x: Tensor) -> Tensor | None:
    """Ids (...) that follow from x (..., D): domains 0 and 2, or token ids below 1000 (of a group: the first)."""
    if layer.router.needs_ids is None:
        return None
    ids = (1e4 * x[..., 0].float().nan_to_num()).long()
    return 2 * (ids % 2) if layer.router.needs_ids == "domain" else ids % 1000


def route(layer: MoELayer, x: Tensor, **options) -> Routing:
    """``layer.route`` with ids where they are needed."""
    return layer.route(x, ids=ids_of(layer, x), **options)


def own_score(layer: MoELayer, expert_id: int, x: Tensor) -> Tensor:
    """One expert's score for every x, from its own rows alone."""
    if layer.router.needs_ids is None:
        return layer.expert_score(expert_id, x)
    return layer.router.scores(x, layer.pool.namespace(layer.namespace, [expert_id]), ids_of(layer, x)).squeeze(1)


def check_number_of_choices(layer: MoELayer, routing: Routing) -> None:
    """Tokens that choose have K experts each, or any number; experts that choose share the tokens evenly."""
    if isinstance(layer.router, ReLURouter):
        assert routing.top_k == 3
        assert torch.equal(routing.choices >= 0, routing.weight.view_as(routing.choices) > 0)
    elif routing.top_k is not None:
        assert routing.choices.shape == (routing.num_tokens, layer.router.num_active(3))
    else:
        assert layer.router.scope == "batch"
        assert len(routing.load.unique()) <= 1


def test_every_router_class_is_here(make: Callable[[], Router]):
    members = [getattr(modmoe.gating, name) for name in modmoe.gating.__all__]
    routers = {c for c in members if inspect.isclass(c) and issubclass(c, Router) and not inspect.isabstract(c)}
    assert routers <= {type(other()) for other in ROUTERS.values()}


def test_what_it_declares(make: Callable[[], Router]):
    router = make()
    assert router.scope in ("token", "sequence", "batch")
    assert router.weight_sum in ("1", "<= 1", "any")
    assert router.in_features == D
    assert 1 <= router.num_active(3) <= 3
    assert set(router.shared_parts) <= {name for name, _ in (*router.named_parameters(), *router.named_buffers())}


def test_equal_seeds_route_equally(make: Callable[[], Router]):
    x = data()[0]
    first, again = route(layer_of(make), x), route(layer_of(make), x)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.expert_index, again.expert_index)
    assert torch.equal(first.weight, again.weight)


def test_weights_add_up_as_declared(make: Callable[[], Router]):
    layer = layer_of(make)
    routing = route(layer, data()[0])
    total = routing.matrix().sum(1)
    if layer.router.weight_sum == "1":
        assert_close(total, torch.ones_like(total))
    elif layer.router.weight_sum == "<= 1":
        assert total.max() <= 1 + 1e-6
    check_number_of_choices(layer, routing)
    assert routing.weight.min() >= 0
    assert_close(routing.probs.sum(1), torch.ones_like(total))


def test_a_token_does_not_depend_on_its_batch(make: Callable[[], Router]):
    layer, x = quiet(layer_of(make)), data()[0][::4]
    if layer.router.scope == "sequence":
        x = x.unsqueeze(1)  # then it is sequences of one token that do not meet
    together = route(layer, x).logits
    alone = torch.cat([route(layer, token).logits for token in x.split(1)])
    reversed_order = route(layer, x.flip(0)).logits.flip(0)
    assert (alone - together).abs().max() <= 1e-6 * together.abs().max()
    assert (reversed_order - together).abs().max() <= 1e-6 * together.abs().max()


def test_eval_is_deterministic_and_changes_nothing(make: Callable[[], Router]):
    layer, x = layer_of(make).eval(), data()[0]
    before = copy.deepcopy(layer.state_dict())
    first = route(layer, x)
    assert torch.equal(route(layer, x).logits, first.logits)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(make: Callable[[], Router], num_tokens: int):
    layer, x = layer_of(make), data()[0][:num_tokens]
    routing = route(layer, x)
    assert routing.logits.shape == (num_tokens, 3)
    check_number_of_choices(layer, routing)
    assert layer(x, ids=ids_of(layer, x)).shape == (num_tokens, D)


def test_save_and_load(make: Callable[[], Router]):
    layer, x = quiet(layer_of(make)), data()[0]
    layer.freeze([0])
    loaded = MoELayer(ExpertPool(MLPExpert(D, 4), 1 if layer.router.num_active(9) == 1 else 2), make())
    quiet(loaded).load_state_dict(layer.state_dict())
    assert loaded.pool.ids == (0, 1, 2)
    assert loaded.pool.frozen_ids == (0,)
    assert torch.equal(route(loaded, x).logits, route(layer, x).logits)
    assert torch.equal(route(loaded, x).expert_index, route(layer, x).expert_index)


def test_growth_leaves_frozen_scores_and_rows(make: Callable[[], Router]):
    layer, x = quiet(layer_of(make)), data()[0]
    layer.freeze([0, 1, 2])
    rows = [layer.pool.expert_state(expert_id) for expert_id in range(3)]
    own = [own_score(layer, expert_id, x) for expert_id in range(3)]
    before = route(layer, x).logits
    for _ in range(2):
        new = layer.add_experts(1)[0]
        if new == 3:
            observe(layer, new)
    closed = {} if layer.router.separate_scores else {"expert_mask": torch.arange(5) < 3}
    after = route(layer, x, **closed).logits[:, :3]
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    for expert_id in range(3):
        assert torch.equal(own_score(layer, expert_id, x), own[expert_id])
        state = layer.pool.expert_state(expert_id)
        assert state.keys() == rows[expert_id].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in rows[expert_id].items())


def test_closed_experts_get_nothing(make: Callable[[], Router]):
    layer, x = layer_of(make), data()[0]
    routing = route(layer, x, expert_mask=torch.tensor([True, False, True]))
    assert routing.load[1] == 0
    assert routing.matrix()[:, 1].abs().max() == 0


def test_padding_is_assigned_to_nobody(make: Callable[[], Router]):
    layer, x = quiet(layer_of(make)), data()[0][:5].clone()
    mask = torch.tensor([True, True, False, True, True])
    expected = route(layer, x[mask])
    x[2] = torch.nan
    routing = route(layer, x, mask=mask)
    assert (routing.expert_index[routing.token_index == 2] == -1).all()
    assert routing.top_k == expected.top_k
    if routing.top_k is not None:
        assert torch.equal(routing.choices[mask], expected.choices)
    assert_close(routing.matrix()[mask], expected.matrix())


def test_a_non_finite_token_is_refused(make: Callable[[], Router]):
    layer, x = layer_of(make), data()[0][:3].clone()
    x[1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="non-finite input at token 1 of 3"):
        route(layer, x)


def test_gradients_reach_the_input(make: Callable[[], Router]):
    layer = layer_of(make)
    x = data()[0][:4].clone().requires_grad_()
    routing = route(layer, x)
    through_scores = layer.router.needs_ids is None  # ids have no gradient: it comes from the experts alone
    y = routing.logits if through_scores else layer(x, ids=ids_of(layer, x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_half_precision_inputs_are_scored_in_float32(make: Callable[[], Router]):
    layer, x = layer_of(make), data()[0].half()
    rows = layer.pool.namespace(layer.namespace)
    scores = layer.router.scores(x, rows, ids_of(layer, x))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, layer.router.scores(x.float(), rows, ids_of(layer, x)))
