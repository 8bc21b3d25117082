"""The mixture: one expert is a neural process; growth, freezing, saving."""

import pytest
import torch

from modmoe import sync_optimizer
from modmoe.growable import GrowableParameter
from modmoe.kernels.batched import BatchedOps
from modmoe.kernels.reference import run_reference
from modmoe.meta.processes import NP, MoENeuralProcess
from modmoe.meta.processes.decoder import DecoderExpert
from modmoe.meta.processes.objectives import elbo_points, exact_points


def answer_of(model, batch, generator, experts=None) -> torch.Tensor:
    answer = model(batch, num_samples=4, generator=generator, experts=experts)
    return torch.stack([answer.log_marginal(batch.target_y), answer.mean.squeeze(2)])


def train(model, batch, optimizer, steps: int = 3, objective: str = "exact") -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(batch, objective).backward()
        optimizer.step()


@torch.no_grad()
def copy_process(process: NP, mixture: MoENeuralProcess) -> None:
    """Give the only expert of a mixture a neural process's parameters; its slot and score keep their own."""
    mixture.encoder.load_state_dict(process.encoder.state_dict())
    decoder = process.decoder
    weights = {
        ("latent", "weight"): process.head.weight.t(),
        ("latent", "bias"): process.head.bias,
        ("expert", "w_code"): decoder.from_code.weight.t(),
        ("expert", "b_in"): decoder.from_code.bias,
        ("expert", "w_x"): decoder.from_x.weight.t(),
        ("expert", "w_mid"): decoder.middle.weight.t(),
        ("expert", "b_mid"): decoder.middle.bias,
    }
    for (namespace, name), value in weights.items():
        mixture.pool.namespace(namespace)[name][0] = value
    mixture.pool.namespace("expert")["w_out"][0, :, 1:] = decoder.out.weight.t()
    mixture.pool.namespace("expert")["b_out"][0, 1:] = decoder.out.bias


@pytest.mark.parametrize("num_classes", [None, 3])
def test_one_expert_is_a_neural_process(num_classes, model_of, tasks_of, seeded):
    process = model_of("np", in_features=2, num_classes=num_classes)
    mixture = MoENeuralProcess(2, 1, 1, 12, 5, 10, num_classes=num_classes)
    copy_process(process, mixture)
    batch = tasks_of(inputs=2, num_classes=num_classes)
    answers = [model(batch, num_samples=4, generator=seeded()) for model in (process, mixture)]
    torch.testing.assert_close(answers[0].mean, answers[1].mean, atol=1e-6, rtol=0)
    joints = [answer.log_joint(batch.target_y) for answer in answers]
    torch.testing.assert_close(*joints, atol=1e-5, rtol=1e-6)  # sums of 5 points
    for objective in process.objectives:
        losses = [model.loss(batch, objective, generator=seeded()) for model in (process, mixture)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
        gradients = [
            torch.autograd.grad(losses[i], m.encoder.layers[0].weight)[0] for i, m in ((0, process), (1, mixture))
        ]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_decoders_equal_a_loop_with_all_gradients():
    torch.manual_seed(0)
    expert = DecoderExpert(3, 2, 6, 4)
    shapes = {
        name: spec.draw(5, expert.sizes(), torch.empty(0, dtype=torch.float64))
        for name, spec in expert.row_specs().items()
    }
    rows = {name: values.requires_grad_() for name, values in shapes.items()}
    codes = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    fast = expert.decode(codes, x, BatchedOps(rows))
    pairs = torch.cat([codes.unsqueeze(3).expand(5, 2, 3, 4, 3), x.expand(5, 2, 3, 4, 2)], -1).reshape(-1, 5)
    slow = run_reference(expert, rows, pairs, torch.arange(5).repeat_interleave(24)).view(5, 2, 3, 4, 4)
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(fast)
    found = [torch.autograd.grad((y * weights).sum(), [codes, x, *rows.values()]) for y in (fast, slow)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_slots_by_hand(tasks_of, model_of):
    model, batch = model_of("moe_np"), tasks_of()
    with torch.no_grad():  # scores ln 1, ln 2, ln 5 at every point: shares 1/8, 2/8, 5/8
        model.pool.namespace("slot")["weight"].zero_()
        model.pool.namespace("slot")["bias"].copy_(torch.tensor([1.0, 2.0, 5.0]).log())
    points = model.read(batch)
    torch.testing.assert_close(model.assign(points), torch.tensor([0.125, 0.25, 0.625]).expand(4, 6, 3))
    torch.testing.assert_close(model.assign(points, (0, 1)), torch.tensor([1 / 3, 2 / 3]).expand(4, 6, 2))


def test_gate_is_the_softmax_of_the_experts_own_scores(model_of, tasks_of, seeded):
    model, batch = model_of("moe_np"), tasks_of()
    context = model.read(batch)
    z = model.latent(context).draw(4, seeded(), shared=True)
    own = torch.stack([model.expert_output(e, z[e], batch.target_x) for e in model.pool.ids], 3)  # (S, B, N, K, .)
    answer = model(batch, num_samples=4, generator=seeded())
    torch.testing.assert_close(answer.log_gates, own[..., 0].transpose(0, 1).log_softmax(-1))
    torch.testing.assert_close(answer.means, own[..., 1:2].transpose(0, 1))


def test_exact_is_never_below_the_elbo_for_the_same_z(model_of, tasks_of, seeded):
    gaps = []
    for seed in range(20):
        model, batch = model_of("moe_np", seed=seed), tasks_of(seed=seed)
        context = model.read(batch)
        z = model.latent(model.read_with_targets(context, batch, batch.target_y)).draw(4, seeded(seed), shared=False)
        decoded = model.decode(z, context, batch.target_x)
        densities = model.likelihood.log_prob(decoded.raw, batch.target_y)
        gaps.append(exact_points(densities, decoded.log_gates) - elbo_points(densities, decoded.log_gates))
    assert torch.stack(gaps).min() >= 0
    assert torch.stack(gaps).mean() > 1e-3


def test_growth_keeps_the_survivors_optimizer_state(model_of, tasks_of):
    model, batch = model_of("moe_np"), tasks_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, batch, optimizer)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    assert model.grow(2) == [3, 4]
    sync_optimizer(optimizer, model)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], before[name])
        else:
            assert parameter not in optimizer.state
    model.freeze([1])
    sync_optimizer(optimizer, model)
    for growable in (m for m in model.modules() if isinstance(m, GrowableParameter)):
        kept = [tensor for tensor, rows in growable.live() if [row.owner for row in rows] == [0, 2]]
        assert len(kept) == 1
        assert optimizer.state[kept[0]]["step"] == 3
    train(model, batch, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("objective", ["exact", "elbo", "gumbel"])
def test_frozen_experts_are_bit_identical_after_training(objective, model_of, tasks_of, seeded):
    model, batch = model_of("moe_np"), tasks_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, batch, optimizer)
    z, x = torch.randn(2, 4, 5), batch.target_x
    own = {e: model.expert_output(e, z, x) for e in (0, 1)}
    rows = {e: model.pool.expert_state(e) for e in (0, 1)}
    live = model.pool.expert_state(2)
    model.freeze([0, 1])
    model.grow(1, decoder_features=7)
    sync_optimizer(optimizer, model)
    train(model, batch, optimizer, objective=objective)
    for e in (0, 1):
        assert torch.equal(model.expert_output(e, z, x), own[e])  # decoder and score
        assert all(torch.equal(value, rows[e][name]) for name, value in model.pool.expert_state(e).items())
    assert not any(torch.equal(value, live[name]) for name, value in model.pool.expert_state(2).items())
    assert answer_of(model, batch, seeded()).isfinite().all()


def test_a_frozen_pool_answers_as_before_when_new_experts_are_left_out(model_of, tasks_of, seeded):
    model, batch = model_of("moe_np"), tasks_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, batch, optimizer)
    before = answer_of(model, batch, seeded())
    model.freeze()
    new = model.grow(2, task="later")
    sync_optimizer(optimizer, model)
    train(model, batch, optimizer)
    assert torch.equal(answer_of(model, batch, seeded(), experts=(0, 1, 2)), before)
    assert not torch.equal(answer_of(model, batch, seeded()), before)
    alone = model(batch, num_samples=4, generator=seeded(), experts=new)
    assert alone.means.shape[3] == 2
    assert [model.pool.record(e).task for e in model.pool.ids] == [None, None, None, "later", "later"]


def test_the_order_of_experts_is_the_order_that_is_asked_for(model_of, tasks_of):
    model, batch = model_of("moe_np"), tasks_of()
    model.grow(2)
    model.freeze([1])
    context = model.read(batch)
    z = torch.randn(5, 2, 4, 5)
    all_of_them = model.decode(z, context, batch.target_x)
    for e in model.pool.ids:
        own = model.expert_output(e, z[e], batch.target_x)[..., 1:].transpose(0, 1)
        torch.testing.assert_close(all_of_them.raw[..., e, :], own)
    some = model.decode(z[[4, 1, 0]], context, batch.target_x, (4, 1, 0))
    torch.testing.assert_close(some.raw, all_of_them.raw[..., [4, 1, 0], :])


def test_a_grown_model_is_saved_and_loaded(model_of, tasks_of, seeded, tmp_path):
    model, batch = model_of("moe_np"), tasks_of()
    model.grow(2)
    model.freeze([0, 3])
    train(model, batch, torch.optim.Adam(model.parameters(), lr=1e-2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = model_of("moe_np", seed=5)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert loaded.pool.ids == (0, 1, 2, 3, 4)
    assert loaded.pool.frozen_ids == (0, 3)
    assert torch.equal(answer_of(loaded, batch, seeded()), answer_of(model, batch, seeded()))


def test_experts_are_removed(model_of, tasks_of, seeded):
    model, batch = model_of("moe_np"), tasks_of()
    some = model(batch, num_samples=4, generator=seeded(), experts=(0, 2)).log_joint(batch.target_y)
    model.pool.remove([1])
    torch.testing.assert_close(model(batch, num_samples=4, generator=seeded()).log_joint(batch.target_y), some)


def test_bad_experts(model_of, tasks_of):
    model, batch = model_of("moe_np"), tasks_of()
    with pytest.raises(ValueError, match="no experts with ids \\[7\\]"):
        model(batch, experts=(0, 7))
    for experts in ((), (1, 1)):
        with pytest.raises(ValueError, match="at least one expert and none twice"):
            model(batch, experts=experts)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        MoENeuralProcess(1, num_experts=0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.grow(0)
    with pytest.raises(ValueError, match="every size of a decoder must be at least 1"):
        MoENeuralProcess(1, code_features=0)
