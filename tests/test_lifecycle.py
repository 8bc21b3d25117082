"""What outlives the growth of a pool: any sequence of changes, copies, clones, second-order gradients, compilation."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from modmoe import (
    DenseRouter,
    ExpertPool,
    GrowableParameter,
    MLPExpert,
    MoELayer,
    PrototypeRouter,
    Routing,
    RowSpec,
    TopKRouter,
    sync_optimizer,
)

D, H = 3, 4


def alone(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert's output from its own rows, in plain torch."""
    w_in, b_in, w_out, b_out = (state[f"expert.{name}"][0] for name in ("w_in", "b_in", "w_out", "b_out"))
    return F.gelu(x @ w_in + b_in) @ w_out + b_out


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small wait longer for other threads than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- any sequence of changes -----------------------------------------------------------------------


class Model(nn.Module):
    """Two gates and a head on one pool: rows that are trained, fitted, and added late."""

    def __init__(self, num_experts: int):
        super().__init__()
        pool = ExpertPool(MLPExpert(D, H), num_experts)
        self.dense = MoELayer(pool, DenseRouter(D))
        self.fitted = MoELayer(pool, PrototypeRouter(D))
        pool.declare("head", {"weight": RowSpec((D,), count=0)})

    @property
    def pool(self) -> ExpertPool:
        return self.dense.pool

    def forward(self, x):
        return torch.cat([self.dense(x), self.fitted(x), x @ self.pool.namespace("head")["weight"].T], 1)


class Story:
    """A model that changes, and a slow dictionary of what must survive: (rows, expert id) -> moments."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.model = Model(2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.x = torch.randn(6, D)
        self.moments: dict[tuple[str, int], list[dict[str, torch.Tensor]]] = {}  # one entry for each row
        self.interrupted: set[int] = set()  # frozen since the last sync: their moments may start again
        self.frozen: dict[int, dict[str, torch.Tensor]] = {}

    def growables(self) -> dict[str, GrowableParameter]:
        pool = self.model.pool
        return {
            f"{namespace}.{name}": growable
            for namespace in pool.namespaces
            for name, growable in pool.rows[namespace].items()
            if isinstance(growable, GrowableParameter)
        }

    def read_moments(self) -> dict[tuple[str, int], list[dict[str, torch.Tensor] | None]]:
        found: dict = {}
        for name, growable in self.growables().items():
            numbered = sorted(
                (row.number, row.owner, tensor, index)
                for tensor, rows in growable.live()
                for index, row in enumerate(rows)
            )
            for _, owner, tensor, index in numbered:
                state = self.optimizer.state.get(tensor)
                entry = state and {k: (v[index] if v.dim() else v).clone() for k, v in state.items()}
                found.setdefault((name, owner), []).append(entry)
        return found

    # every change of structure, by numbers that hypothesis draws

    def change(self, kind: str, a: int, b: int) -> None:
        pool = self.model.pool
        before = {expert_id: pool.expert_state(expert_id) for expert_id in pool.ids}
        scores = self.scores()
        pick = [expert_id for index, expert_id in enumerate(pool.ids) if (a >> index) & 1] or [
            pool.ids[a % len(pool.ids)]
        ]
        if kind == "grow" and len(pool.ids) < 8:  # a larger pool would only be slower
            new = pool.add_experts(1 + a % 3, task=("a", 1, None)[b % 3], hidden_features=(H, H + 2)[b % 2])
            assert not set(new) & set(before)
        elif kind == "freeze":
            live = {expert_id for expert_id in pick if expert_id not in pool.frozen_ids}
            pool.freeze(pick)
            self.interrupted |= live
        elif kind == "unfreeze":
            pool.unfreeze(pick)
        elif kind == "remove":
            pick = [expert_id for expert_id in pick if expert_id != pool.ids[b % len(pool.ids)]]
            pool.remove(pick)
            self.moments = {key: value for key, value in self.moments.items() if key[1] not in pick}
        elif kind == "copy":
            self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        pool = self.model.pool
        for expert_id in set(before) & set(pool.ids):
            assert_same(pool.expert_state(expert_id), before[expert_id])
        for key, column in self.scores().items():
            if key in scores:
                assert_close(column, scores[key], rtol=1e-6, atol=1e-6)
        self.frozen = {i: self.frozen.get(i, pool.expert_state(i)) for i in pool.frozen_ids}
        self.check_experts()

    def add_row(self, a: int) -> None:
        pool = self.model.pool
        expert_id = pool.ids[a % len(pool.ids)]
        if expert_id not in pool.frozen_ids:
            pool.add_rows("head", expert_id, {"weight": torch.randn(1 + a % 2, D)})

    def sync(self) -> None:
        kept = {key: list(entries) for key, entries in self.moments.items()}
        sync_optimizer(self.optimizer, self.model)
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in self.model.parameters())
        assert {id(p) for p in self.optimizer.state} <= set(held)
        pool = self.model.pool
        for (name, expert_id), entries in self.read_moments().items():
            old = kept.get((name, expert_id), [])
            for index, entry in enumerate(entries):
                want = old[index] if index < len(old) else None
                if entry is None and expert_id in self.interrupted:
                    continue
                assert (entry is None) == (want is None), (name, expert_id)
                if want is not None:
                    assert_same(entry, want)
        self.moments = {k: v for k, v in self.read_moments().items() if k[1] not in pool.frozen_ids}
        self.interrupted = set()

    def train(self, a: int) -> None:
        self.sync()
        pool = self.model.pool
        before = {expert_id: pool.expert_state(expert_id) for expert_id in pool.ids}
        expert_id = pool.ids[a % len(pool.ids)]
        if expert_id not in pool.frozen_ids:
            self.model.fitted.observe(expert_id, self.x + a, torch.arange(6) % 2)
        if len(pool.frozen_ids) < pool.num_experts:
            self.optimizer.zero_grad()
            self.model(self.x).square().mean().backward()
            self.optimizer.step()
        self.moments = self.read_moments()
        for expert_id, state in before.items():
            moved = not torch.equal(pool.expert_state(expert_id)["expert.b_out"], state["expert.b_out"])
            assert moved == (expert_id not in pool.frozen_ids)
        for expert_id, state in self.frozen.items():
            assert_same(pool.expert_state(expert_id), state)

    # what must hold at any time

    @torch.no_grad()
    def scores(self) -> dict[tuple[str, int], torch.Tensor]:
        """The raw score of each expert in each gate; none where it has no rows, as in a gate without its data."""
        pool = self.model.pool
        return {
            (layer.namespace, expert_id): layer.router.score(self.x, pool.namespace(layer.namespace))[:, position]
            for layer in (self.model.dense, self.model.fitted)
            for position, expert_id in enumerate(pool.ids)
            if any(name.startswith(layer.namespace + ".") for name in pool.expert_state(expert_id))
        }

    @torch.no_grad()
    def check_experts(self) -> None:
        layer, pool = self.model.dense, self.model.pool
        columns = self.scores()
        for position, expert_id in enumerate(pool.ids):
            state = pool.expert_state(expert_id)
            routing = Routing.assigned(torch.full((6,), position), pool.num_experts)
            assert_close(layer.compute(self.x, routing), alone(state, self.x), rtol=1e-6, atol=1e-6)
            score = self.x @ state["gate.weight"][0] + state["gate.bias"][0]
            assert_close(columns["gate", expert_id], score, rtol=1e-6, atol=1e-6)

    def check_reload(self, num_experts: int) -> None:
        fresh = Model(num_experts)
        fresh.load_state_dict(self.model.state_dict())
        assert torch.equal(fresh(self.x), self.model(self.x))
        got, want = fresh.pool, self.model.pool
        assert got.ids == want.ids
        assert got.frozen_ids == want.frozen_ids
        for expert_id in want.ids:
            assert got.record(expert_id) == want.record(expert_id)
            assert_same(got.expert_state(expert_id), want.expert_state(expert_id))
        assert_same(dict(fresh.state_dict()), dict(self.model.state_dict()))
        assert got.add_experts() == copy.deepcopy(want).add_experts()


STRUCTURE = ("grow", "freeze", "unfreeze", "remove", "copy")
OPERATION = st.tuples(
    st.sampled_from((*STRUCTURE, "train", "train", "sync", "row")), st.integers(0, 63), st.integers(0, 7)
)


# without the shrinking phase, which would take minutes: the sequence that fails is short enough to be read
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 9), operations=st.lists(OPERATION, min_size=10, max_size=24))
def test_any_sequence_of_changes(seed, operations):
    story = Story(seed)
    for kind, a, b in operations:
        if kind in STRUCTURE:
            story.change(kind, a, b)
        elif kind == "train":
            story.train(a)
        elif kind == "sync":
            story.sync()
        else:
            story.add_row(a)
    story.sync()
    story.check_reload(1 + seed)
    story.train(0)


# -- copies ----------------------------------------------------------------------------------------


def grown(router=None, backend="auto", dtype=torch.float32) -> MoELayer:
    """Experts 0, 2 and 3 frozen, 1 and 4 live, two hidden sizes."""
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, H), 3), router or TopKRouter(D, top_k=2), backend=backend)
    layer.freeze([0, 2])
    layer.add_experts(2, task=None, hidden_features=6)
    layer.freeze([3])
    return layer.to(dtype)


def by_pickle(layer: MoELayer) -> MoELayer:
    return pickle.loads(pickle.dumps(layer))


def by_torch(layer: MoELayer) -> MoELayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_equal_and_independent(duplicate):
    layer = grown()
    x = torch.randn(9, D)
    y = layer(x)  # its graph is alive while the copy is made
    twin = duplicate(layer)
    assert torch.equal(twin(x), y)
    assert_same(dict(twin.state_dict()), dict(layer.state_dict()))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in layer.parameters()}
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    twin.remove([0, 1])
    twin.unfreeze([2])
    twin.add_experts(3)
    with torch.no_grad():
        for value in (*twin.parameters(), *twin.buffers()):
            value.zero_()
    assert_same(dict(layer.state_dict()), before)
    assert layer.pool.ids == (0, 1, 2, 3, 4)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_another_dtype_and_on_with_it(dtype, tolerance):
    layer = grown(DenseRouter(D))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(9, D)
    want = layer(x)
    assert layer.to(dtype) is layer
    assert_close(layer(x.to(dtype)), want.to(dtype), rtol=0, atol=tolerance)
    layer.freeze([1])
    layer.add_experts(2)
    layer.unfreeze([0])
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    sync_optimizer(optimizer, layer)
    layer(x.to(dtype)).square().sum().backward()
    optimizer.step()
    assert layer(x.to(dtype)).dtype == dtype
    assert layer.pool.expert_state(5)["expert.w_in"].dtype == dtype


# -- functional_call and learn2learn ---------------------------------------------------------------


def test_functional_call_reads_the_tensors_that_it_is_given():
    layer = grown(dtype=torch.float64)
    x = torch.randn(12, D, dtype=torch.float64)
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    assert len(params) == 2 * 5
    y = functional_call(layer, params, x)
    assert torch.equal(y, layer(x))
    got = torch.autograd.grad(y.square().sum(), list(params.values()))
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    through_func = torch.func.grad(lambda p: functional_call(layer, p, x).square().sum())(params)
    assert_close(list(through_func.values()), list(want), rtol=1e-12, atol=1e-12)
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    zeros |= {name: torch.zeros_like(b) for name, b in layer.named_buffers() if "frozen" in name}
    assert functional_call(layer, zeros, x).abs().max() == 0


def test_gradgradcheck_of_a_grown_layer():
    layer = grown(DenseRouter(D), dtype=torch.float64)
    x = torch.randn(4, D, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(*tensors):
        return functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


def losses(x: torch.Tensor, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(5)
    targets = torch.randn(2, *x.shape, generator=generator).to(dtype)
    return [lambda y, target=target: (y - target).square().mean() for target in targets]


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float64, "auto", 1e-12), (torch.float32, "dense", 1e-6), (torch.float32, "grouped", 1e-6)],
)
def test_second_order_maml_equals_the_derivation_by_hand(dtype, backend, tolerance):
    l2l = pytest.importorskip("learn2learn")
    layer = grown(backend=backend, dtype=dtype)
    x = torch.randn(12, D).to(dtype)
    inner, outer = losses(x, dtype)
    rate = 0.3
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    maml = l2l.algorithms.MAML(layer, rate, first_order=False, allow_nograd=True, allow_unused=True)
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(inner(learner(x)))
    outer(learner(x)).backward()
    got = [p.grad for p in layer.parameters()]
    assert_same(dict(layer.state_dict()), before)

    base = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    adapted = dict(base)
    for _ in range(2):
        loss = inner(functional_call(layer, adapted, x))
        gradients = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
        adapted = {name: p - rate * g for (name, p), g in zip(adapted.items(), gradients, strict=True)}
    want = torch.autograd.grad(outer(functional_call(layer, adapted, x)), list(base.values()))
    assert_close(got, list(want), rtol=tolerance, atol=tolerance)

    adapted = dict(base)  # and second order matters here
    for _ in range(2):
        loss = inner(functional_call(layer, adapted, x))
        gradients = torch.autograd.grad(loss, list(adapted.values()))
        adapted = {name: p - rate * g for (name, p), g in zip(adapted.items(), gradients, strict=True)}
    first_order = torch.autograd.grad(outer(functional_call(layer, adapted, x)), list(base.values()))
    assert max((a - b).abs().max() for a, b in zip(first_order, want, strict=True)) > 1e-3


@pytest.mark.parametrize("who", ["clone", "base"])
def test_growing_a_clone_or_its_base_leaves_the_other_alone(who):
    utils = pytest.importorskip("learn2learn.utils")
    base = grown(DenseRouter(D))
    clone = utils.clone_module(base)
    changed, other = (clone, base) if who == "clone" else (base, clone)
    x = torch.randn(9, D)
    before, output = {key: value.clone() for key, value in other.state_dict().items()}, other(x)
    changed.freeze([1])
    changed.add_experts(2, init="copy")
    changed.unfreeze([2])
    changed.remove([0])
    assert_close(changed(x).shape, output.shape)
    assert changed.pool.ids == (1, 2, 3, 4, 5, 6)
    assert other.pool.ids == (0, 1, 2, 3, 4)
    assert other.pool.frozen_ids == (0, 2, 3)
    assert_same(dict(other.state_dict()), before)
    assert torch.equal(other(x), output)
    other(x).sum().backward()  # a clone's gradient still reaches the tensors that were the base's
    assert other.add_experts() == [5]


def test_a_clones_statistics_are_its_own():
    utils = pytest.importorskip("learn2learn.utils")
    base = MoELayer(ExpertPool(MLPExpert(D, H), 2), PrototypeRouter(D))
    base.observe(0, torch.randn(6, D), torch.arange(6) % 2)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    clone = utils.clone_module(base)
    clone.observe(0, torch.randn(6, D), torch.arange(6) % 2)
    assert_same(dict(base.state_dict()), before)
    assert clone.pool.expert_state(0)["gate.count"].tolist() == [6, 6]


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_inductor_equals_eager(fresh_dynamo):
    layer = grown()
    x, weight = torch.randn(20, D), torch.randn(20, D)
    want = layer(x)
    want_grads = torch.autograd.grad((want * weight).sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True)
    got = compiled(x)
    grads = torch.autograd.grad((got * weight).sum(), list(layer.parameters()))
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_close(list(grads), list(want_grads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_twelve_growths_later_it_is_still_compiled(fresh_dynamo, backend):
    """Train and no_grad eval in turn: one new graph each for a new structure, none for a known one."""
    layer = MoELayer(ExpertPool(MLPExpert(D, H), 2), TopKRouter(D, top_k=2))
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(10, D)
    for growth in range(13):
        if growth:
            layer.freeze()
            layer.add_experts(1)
            sync_optimizer(optimizer, layer)
        graphs = counter.frame_count
        for expected in (1, 0):  # the second round finds both graphs
            layer.train()
            y = compiled(x)
            assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
            assert all(p.grad is not None for p in layer.parameters())
            assert counter.frame_count - graphs <= expected
            graphs = counter.frame_count
            layer.eval()
            with torch.no_grad():
                assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
            assert counter.frame_count - graphs <= expected
            graphs = counter.frame_count
    assert counter.frame_count >= 13  # it did compile each structure, and did not fall back to eager
    assert not torch._dynamo.utils.counters["graph_break"]
