"""Back to dense: the average, the busiest expert, whole models, and the measured load."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import (
    ConvExpert,
    DenseRouter,
    ExpertPool,
    GatedSharedExpert,
    MLPExpert,
    MoELayer,
    SwiGLUExpert,
    TopKRouter,
)
from modmoe.conversion import SwiGLU, average_expert, busiest_expert, measure_load, to_dense, upcycle

D, H = 4, 6
KINDS = [
    MLPExpert(D, H, 3, activation="tanh"),
    MLPExpert(D, H, activation="gelu_tanh", bias=False),
    SwiGLUExpert(D, H, 3),
    SwiGLUExpert(D, H, bias=True),
]


def make_layer(kind, num_experts=3, shared=None, dtype=torch.float64) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(
        ExpertPool(kind, num_experts), TopKRouter(kind.in_features, min(2, num_experts)), shared_expert=shared
    ).to(dtype)


class Net(nn.Module):
    """Two layers of which one has a shared expert."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = make_layer(MLPExpert(D, H), dtype=torch.float32)
        self.last = make_layer(SwiGLUExpert(D, H), 4, GatedSharedExpert(nn.Linear(D, D), D), torch.float32)

    def forward(self, x):
        return self.last(self.first(x) + x)


def test_average_and_busiest_by_hand():
    layer = MoELayer(ExpertPool(MLPExpert(1, 2, activation="relu"), 3), DenseRouter(1))
    with torch.no_grad():
        for name in ("w_in", "b_in", "w_out", "b_out"):
            bank = layer.pool.growable("expert", name).banks()[0][0]
            bank.copy_(torch.tensor([1.0, 2.0, 6.0]).view(3, *[1] * (bank.dim() - 1)).expand_as(bank))
    # uniform: (1 + 2 + 6) / 3 = 3; by loads 1, 2, 1: (1 + 4 + 6) / 4 = 2.75
    for weights, value in ((None, 3.0), (torch.tensor([1, 2, 1]), 2.75)):
        dense = average_expert(layer, weights)
        assert all(torch.equal(p, torch.full_like(p, value)) for p in dense.parameters())
    # x = 2, all 3: hidden 3 * 2 + 3 = 9, twice; 9 * 3 * 2 + 3 = 57
    assert average_expert(layer)(torch.tensor([[2.0]])).item() == 57.0
    for load, value in (([5, 1, 0], 1.0), ([0, 1, 2], 6.0), ([3, 7, 7], 2.0)):
        dense = busiest_expert(layer, torch.tensor(load))
        assert all(torch.equal(p, torch.full_like(p, value)) for p in dense.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_it_is_the_expert_of_averaged_rows(kind):
    layer = make_layer(kind)
    layer.freeze([1])  # frozen rows count too, and the result is trainable
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 5, D, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3])
    averaged = average_expert(layer, weights)
    # the reference: a pool of one expert, written row by row
    single = make_layer(kind, 1)
    with torch.no_grad():
        for name in layer.pool.namespace("expert"):
            mean = sum(
                w * layer.pool.expert_state(i)[f"expert.{name}"]
                for w, i in zip(weights.double(), layer.pool.ids, strict=True)
            )
            single.pool.growable("expert", name).banks()[0][0].copy_(mean)
    assert_close(averaged(x), single.expert_output(0, x), atol=1e-7, rtol=1e-7)
    assert_close(busiest_expert(layer, weights)(x), layer.expert_output(1, x), atol=1e-12, rtol=1e-12)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in averaged.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_average_of_equal_experts_equals_the_layer(kind):
    layer = make_layer(kind, 2)
    x = torch.randn(9, D, dtype=torch.float64)
    with torch.no_grad():
        for name in layer.pool.namespace("expert"):
            bank = layer.pool.growable("expert", name).banks()[0][0]
            bank[1] = bank[0]
    assert_close(average_expert(layer)(x), layer(x), atol=1e-12, rtol=1e-12)


def test_the_modules_are_ordinary():
    averaged = average_expert(make_layer(KINDS[0]))
    assert [type(part) for part in averaged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert isinstance(average_expert(make_layer(KINDS[2])), SwiGLU)
    assert average_expert(make_layer(KINDS[2])).down_proj.bias is None


def test_a_whole_model_with_a_shared_expert():
    model = Net().eval()
    layers = {"first": model.first, "last": model.last}
    shared = model.last.shared_expert
    x = torch.randn(7, D)
    hidden = average_expert(model.first)(x) + x
    expected = average_expert(model.last)(hidden) + shared(hidden)
    replaced = to_dense(model)
    assert [name for name, _ in replaced] == ["first", "last"]
    assert all(model.get_submodule(name) is module for name, module in replaced)
    assert not any(isinstance(module, MoELayer) for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    assert model.last.shared is shared
    assert [layer.pool.num_experts for layer in layers.values()] == [3, 4]


def test_busiest_and_weighted_by_measured_load():
    model = Net()
    batches = [torch.randn(20, D), torch.randn(30, D)]
    load = measure_load(model, batches)
    for how, name in (("busiest", "last"), ("average", "first")):
        dense, x = copy.deepcopy(model), torch.randn(5, D)
        to_dense(dense, how, load)
        layer = model.get_submodule(name)
        if how == "busiest":
            expected = layer.expert_output(layer.pool.ids[int(load[name].argmax())], x)
            assert_close(dense.last.dense(x), expected, atol=1e-6, rtol=1e-6)
        else:
            assert_close(dense.first(x), average_expert(layer, load[name])(x))
            assert not torch.allclose(dense.first(x), average_expert(layer)(x))


def test_upcycling_is_undone_by_the_average():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = model(x)
        upcycle(model, r"layers\.\d", 4)
        to_dense(model)
        assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        assert len(upcycle(model, r".*\.linear1", 2)) == 2  # and its blocks are recognised again
        assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_load_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(MoELayer(ExpertPool(MLPExpert(2, 3), 3), TopKRouter(2, 1)), nn.Dropout(0.5))
    with torch.no_grad():  # logits are (x0, x1, -x0 - x1)
        gate = model[0].pool.growable("gate", "weight").banks()[0][0]
        gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    model[1].eval()
    first = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # experts 0, 0, 1, 2
    second = torch.tensor([[5.0, 1.0]])  # expert 0
    load = measure_load(model, [first, (second, "label"), [second]])
    assert {name: counts.tolist() for name, counts in load.items()} == {"0": [4, 1, 1]}
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert not model[0]._forward_hooks


def test_the_load_is_that_of_evaluation_and_has_no_graph():
    class Recorder(nn.Identity):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    seen: list[tuple[bool, bool]] = []
    measure_load(nn.Sequential(Recorder(), make_layer(MLPExpert(D, H), dtype=torch.float32)), [torch.randn(2, D)] * 2)
    assert seen == [(False, False)] * 2


def test_load_counts_each_call_and_leaves_out_padding():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_layer(MLPExpert(D, H), dtype=torch.float32)

        def forward(self, x):
            return self.layer(self.layer(x), mask=torch.tensor([True, True, False]))

    load = measure_load(Twice(), [torch.randn(3, D)])
    assert load["layer"].sum() == 2 * 3 + 2 * 2  # k = 2


def test_refusals():
    uneven = make_layer(MLPExpert(D, H))
    uneven.add_experts(1, hidden_features=H + 1)
    with pytest.raises(
        ValueError, match=r"experts of different sizes have no average: {0: {'hidden_features': 6}.*3: "
    ):
        average_expert(uneven)
    assert busiest_expert(uneven, torch.tensor([0, 0, 0, 1]))[0].out_features == H + 1
    layer = make_layer(MLPExpert(D, H))
    with pytest.raises(ValueError, match=r"a number for each of 3 experts is needed, got \(2,\)"):
        average_expert(layer, torch.ones(2))
    with pytest.raises(ValueError, match=r"numbers of at least 0, and positive somewhere, are needed, got \[1.0, -1.0"):
        average_expert(layer, torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"positive somewhere, are needed, got \[0, 0, 0\]"):
        busiest_expert(layer, torch.zeros(3, dtype=torch.int64))
    conv = MoELayer(ExpertPool(ConvExpert((1, 4, 4), (2,)), 2), DenseRouter(16))
    for convert in (average_expert, lambda layer: busiest_expert(layer, torch.ones(2))):
        with pytest.raises(ValueError, match="an MLPExpert or a SwiGLUExpert becomes a dense block, got ConvExpert"):
            convert(conv)
    with pytest.raises(ValueError, match="contains no MoELayer"):
        measure_load(nn.Linear(2, 2), [])


def test_refusals_of_whole_models_change_nothing():
    model = Net()
    model.last.add_experts(1, hidden_features=H + 1)
    with pytest.raises(ValueError, match="'last': experts of different sizes"):
        to_dense(model)
    assert isinstance(model.first, MoELayer)
    with pytest.raises(ValueError, match=r"the load of each of \['first', 'last'\] is needed, got \[\]"):
        to_dense(model, "busiest")
    with pytest.raises(ValueError, match=r"the load of each of \['first', 'last'\] is needed, got \['first'\]"):
        to_dense(model, "average", {"first": torch.ones(3)})
    with pytest.raises(ValueError, match="how is 'average' or 'busiest', got 'best'"):
        to_dense(model, "best")
    for without in (nn.Linear(2, 2), model.first):
        with pytest.raises(
            ValueError, match="a model that holds MoELayers is needed; of one layer alone take average_"
        ):
            to_dense(without)
