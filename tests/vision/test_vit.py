"""V-MoE and Soft MoE transformers: by hand, against reference and dense twin, growing, saved, and misused."""

import copy

import pytest
import torch
from torch.testing import assert_close

import modmoe
from modmoe import VMoERouter
from modmoe.analysis import usage_metrics
from modmoe.vision import SoftMoEViT, moe_layers

KINDS = ["vmoe", "soft", "conv"]


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_the_router_by_hand():
    layer = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(2, 4), 2), VMoERouter(2, 1, 1.0, 2.0))
    ((gate, _, _),) = layer.pool.growable("gate", "weight").banks()
    with torch.no_grad():
        gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    # evaluation: C = ceil(4 * 1 * 2.0 / 2) = 4, nobody is dropped; weights are e^a / (e^a + 1)
    routing = layer.eval().route(x)
    assert routing.expert_index.tolist() == [0, 0, 0, 1]
    assert_close(routing.weight, torch.tensor([1.0, 3.0, 2.0, 1.0]).sigmoid())
    # training: C = ceil(4 * 1 * 1.0 / 2) = 2, and expert 0 keeps its two best, not the first two; the noise of 1/2
    # cannot be seen where logits are 60 apart
    routing = layer.train().route(60 * x)
    assert routing.requested.tolist() == [0, 0, 0, 1]
    assert sorted(routing.expert_index.tolist()) == [-1, 0, 0, 1]
    assert_close(routing.noise_std, torch.full((4, 2), 0.5))


def test_the_best_tokens_are_kept():
    router = VMoERouter(2, 1, 1.0, 1.0)
    layer = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(2, 4), 2), router).eval()
    ((gate, _, _),) = layer.pool.growable("gate", "weight").banks()
    with torch.no_grad():
        gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    # C = 2: of sigmoid(1), sigmoid(3), sigmoid(2) the smallest goes, though it came first
    routing = layer.route(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    assert routing.expert_index.tolist() == [-1, 0, 0, 1]


def test_parameters_of_a_tiny_model_by_hand(build):
    # embedding 16 * 8 + 8 + 4 * 8; attention and norms 4 * 8 + 4 * 8^2 + 4 * 8; feed-forward 2 * 8 * 12 + 12 + 8
    embed, body, mlp, last = 168, 320, 212, 16 + 8 * 3 + 3
    assert sum(p.numel() for p in build("vit").parameters()) == embed + 4 * (body + mlp) + last
    # in two blocks 3 experts and a gate of 3 * 8; 2 of 3 experts are active
    count = modmoe.count_parameters(build("vmoe"))
    assert count.total == embed + 4 * body + 2 * mlp + 2 * (3 * mlp + 24) + last
    assert count.total - count.active == 2 * mlp
    # two experts of two slots each, and a scale
    soft = modmoe.count_parameters(build("soft"))
    assert soft.total == soft.active == embed + 4 * body + 2 * mlp + 2 * (2 * mlp + 2 * 2 * 8 + 1) + last


# -- against the slow and the dense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", *KINDS])
def test_gradients(kind, build, images):
    model = build(kind).double().eval()
    x = images[:1, :, :, :].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x).sum(1), (x,), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_kernel_equals_the_reference(kind, build, images):
    results = []
    for backend in ("auto", "reference"):
        model = build(kind).double()
        for layer in moe_layers(model).values():
            layer.backend = backend
        torch.manual_seed(3)  # of the routing noise
        y = model(images.double())
        y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in model.named_parameters()}))
    assert_close(results[0], results[1], atol=1e-10, rtol=1e-9)
    assert all(grad is not None for grad in results[0][1].values())


def test_one_expert_equals_the_dense_twin(build, images):
    dense, sparse = build("vit"), build("vmoe", num_experts=1, top_k=1, blocks="all")
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".mlp." not in k}, strict=False)
    with torch.no_grad():
        for twin, block in zip(dense.blocks, sparse.blocks, strict=True):
            for place, part in ((0, "in"), (2, "out")):
                state = block.mlp.pool.expert_state(0)
                twin.mlp[place].weight.copy_(state[f"expert.w_{part}"][0].T)
                twin.mlp[place].bias.copy_(state[f"expert.b_{part}"][0])
    assert_close(sparse.eval()(images), dense.eval()(images), atol=1e-6, rtol=1e-5)


def test_soft_moe_has_as_many_slots_as_tokens_and_the_second_half_of_the_blocks(build):
    model = build("soft")
    assert model.moe_blocks == (2, 3)
    assert {layer.router.slots for layer in moe_layers(model).values()} == {2}  # 4 tokens, 2 experts


def test_images_of_a_batch_do_not_touch_each_other_in_soft_moe(build, images):
    model = build("soft").eval()
    assert_close(model(images)[:2], model(images[:2]), atol=1e-6, rtol=1e-5)


# -- conventions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", *KINDS])
def test_features_in_timm_s_convention(kind, build, images):
    model = build(kind).eval()
    tokens = model.forward_features(images)
    assert tokens.shape == ((5, 16, 4, 4) if kind == "conv" else (5, 4, 8))
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (5, model.num_features)
    assert torch.equal(model.forward_head(tokens), model(images))
    assert torch.equal(model.head(pooled), model(images))
    assert build(kind, num_classes=0).eval()(images).shape == (5, model.num_features)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_s_routing_can_be_analysed_and_written(kind, build, images, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from modmoe.analysis.tensorboard import write_usage

    model = build(kind)
    model(images)
    with SummaryWriter(str(tmp_path)) as writer:
        for name, layer in moe_layers(model).items():
            assert layer.routing.num_tokens == (5 if kind == "conv" else 20)
            metrics = usage_metrics(layer.routing)
            assert 0.0 <= metrics["dropped_fraction"] < 1.0
            assert metrics["load_cv"] >= 0.0
            write_usage(writer, layer.routing, step=0, tag=name)
    assert list(tmp_path.glob("events*"))


# -- growing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_growing_freezing_and_training_on(kind, build, images):
    model = build(kind, balance_weight=0.01) if kind != "soft" else build(kind)
    labels = torch.tensor([0, 1, 2, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    modmoe.freeze(model, {name: pool.ids for name, pool in modmoe.pools(model).items()})
    ids = modmoe.grow(model, 2)
    modmoe.sync_optimizer(optimizer, model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    kept = [p for p in model.parameters() if p in optimizer.state]
    assert kept
    before = {name: [pool.expert_state(i) for i in pool.frozen_ids] for name, pool in modmoe.pools(model).items()}
    new = {name: pool.expert_state(ids[name][0]) for name, pool in modmoe.pools(model).items()}
    head = model.head.weight.clone()
    for _ in range(4):
        step()
    for name, pool in modmoe.pools(model).items():
        for old, expert_id in zip(before[name], pool.frozen_ids, strict=True):
            now = pool.expert_state(expert_id)
            assert all(torch.equal(old[row], now[row]) for row in old)
        moved = pool.expert_state(ids[name][0])
        assert any(not torch.equal(new[name][row], moved[row]) for row in moved)
    assert not torch.equal(head, model.head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_with_task_ids_growth_changes_nothing_for_the_old_task(kind, build, images):
    model = build(kind).eval()
    for pool in modmoe.pools(model).values():
        for expert_id in pool.ids:
            pool.assign_task(expert_id, "a")
    before = model(images, task_ids="a")
    modmoe.grow(model, 1, task="b")
    assert_close(model(images, task_ids="a"), before, atol=1e-6, rtol=1e-5)
    assert (model(images, task_ids=["b"] * 5) - before).abs().max() > 1e-4


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_is_saved_copied_and_loaded(kind, build, images, tmp_path):
    model = build(kind)
    modmoe.freeze(model, [0])
    modmoe.grow(model, 1, task=7)
    expected = model.eval()(images)
    modmoe.save_checkpoint(tmp_path / "model.safetensors", model)
    loaded = build(kind, seed=9).eval()
    modmoe.load_checkpoint(tmp_path / "model.safetensors", loaded)
    assert torch.equal(loaded(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)


def test_seeded_training_steps_are_equal(build, images):
    found = []
    for _ in range(2):
        model = build("vmoe")
        torch.manual_seed(5)
        found.append(model(images))
    assert torch.equal(*found)


def test_bfloat16_autocast(build, images):
    model = build("vmoe")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(build, images):
    with pytest.raises(ValueError, match="patches of 3x3 do not divide an image of 8x8"):
        build("vmoe", patch_size=3)
    with pytest.raises(ValueError, match="unknown block pattern 'last2'"):
        build("vmoe", blocks="last2")
    with pytest.raises(ValueError, match="3 heads do not divide 8 features"):
        build("vit", num_heads=3)
    with pytest.raises(ValueError, match="sizes at least 1, got num_classes=3, features=8, depth=0"):
        build("vit", depth=0)
    with pytest.raises(ValueError, match="top_k=2 experts cannot be chosen out of 1"):
        build("vmoe", num_experts=1)
    with pytest.raises(ValueError, match="capacity factors must be positive"):
        build("vmoe", capacity_factor=0.0)
    for kind in ("vit", "conv"):
        with pytest.raises(ValueError, match=r"images of shape \(B, 1, 8, 8\) are needed, got \(5, 1, 8, 7\)"):
            build(kind)(images[..., :7])
    with pytest.raises(TypeError, match="patch_size"):
        SoftMoEViT(image_size=8, depth=2)
