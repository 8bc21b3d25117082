"""Policies: what they compute, which routers and spaces they take, auxiliary losses, and that they learn."""

import csv

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure

from modmoe import LoRAExpert, NonFiniteError, TopKRouter
from modmoe.catalog import ROUTERS, example_routers
from modmoe.rl import MoEActorCriticPolicy, MoEDQNPolicy, MoESACPolicy, MoETD3Policy, RoutingLogger, grow
from modmoe.rl.experts import DeepMLPExpert, SideBySideExpert, make_expert
from modmoe.rl.network import DENSE_PAIRS
from modmoe.rl.options import MoEOptions, check_router

EVERY = ["ppo", "ppo_discrete", "a2c", "sac", "td3", "dqn"]
ORACLE = {"context": (2, 4), "task_of": "one_hot", "task": 0, "router": "top_k", "router_kwargs": {"top_k": 1}}
FLAT = spaces.Box(-1, 1, (4,), np.float32)


def test_a_mixture_by_hand(make):
    """Two experts of one hidden unit, tanh; both weigh 1/2 (a dense gate of zero rows).

    Hidden unit of expert e: tanh(w_e x_0); outputs: o_e times it. With x_0 = 1, w = (0, 100), o = (5, 3):
    tanh(0) = 0, tanh(100) = 1, so the mean action is 1/2 * 0 + 1/2 * 3 = 1.5; with log_std rows (0, -1) it is -1/2.
    """
    model = make("ppo", hidden_features=1)
    network = model.policy.moe
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.zero_()
        rows = {name: network.pool.growable("expert", f"pi_{name}").live()[0][0] for name in ("w_0", "w_out")}
        rows["w_0"][1, 0, 0] = 100.0
        rows["w_out"][0], rows["w_out"][1] = 5.0, 3.0
        network.pool.growable("log_std", "value").live()[0][0][1] = -1.0
        mixed = network(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0]]))
    assert mixed.outputs.tolist() == [[1.5, 1.5, 0.0]]
    assert mixed.weights.tolist() == [[0.5, 0.5]]
    assert network.log_stds(mixed.weights).tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize("router", ["dense", "top_k", "cosine", "deepseek_v3"])
def test_the_fast_path_equals_the_layer(make, router):
    """Output and every gradient, below and above the size from which inputs are moved to their experts."""
    kwargs = {} if router == "dense" else {"top_k": 2}
    model = make("ppo", router=router, router_kwargs=kwargs, num_experts=5)
    network = model.policy.moe
    network.layer.freeze([1])
    for size in (16, DENSE_PAIRS // 5 + 1):
        x = torch.randn(size, 4)
        results = []
        for fast in (True, False):
            network.zero_grad()
            y = network(x, x).outputs if fast else network.layer(x)
            y.square().sum().backward()
            trained = [p.grad for p in network.layer.parameters() if p.grad is not None]
            assert len(trained) >= 9  # eight kinds of expert rows, and the gate's
            results.append([y, *(grad.clone() for grad in trained)])
        for fast, slow in zip(*results, strict=True):
            assert torch.allclose(fast, slow, atol=1e-4, rtol=1e-4)


def test_one_expert_equals_a_dense_network(make):
    model = make("ppo", num_experts=1)
    state = {name: rows[0] for name, rows in model.policy.moe.pool.expert_state(0).items()}
    x = torch.randn(8, 4)
    hidden = torch.tanh(x @ state["expert.pi_w_0"] + state["expert.pi_b_0"])
    expected = hidden @ state["expert.pi_w_out"] + state["expert.pi_b_out"]
    assert torch.allclose(model.policy.moe(x, x).outputs[:, :2], expected, atol=1e-6)
    assert torch.allclose(model.policy.get_distribution(x).mode(), expected, atol=1e-6)


def test_gradients_in_float64(make):
    network = make("ppo").policy.moe.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: network(x, x).outputs, (x,))
    assert torch.autograd.gradcheck(lambda x: network.log_stds(network(x, x).weights), (x,))


@pytest.mark.parametrize("name", sorted(example_routers(4)))
def test_every_router_is_taken_or_refused_with_the_reason(make, name):
    router = example_routers(4)[name]
    allowed = router.scope == "token" and not router.stochastic and router.needs_ids is None
    if not allowed:
        with pytest.raises(ValueError, match=r"decides for a whole|draws random numbers|which an observation does not"):
            make("ppo", router=router, num_experts=4)
        return
    model = make("ppo", router=router, num_experts=4).learn(32)
    obs = torch.randn(16, 4)
    actions = torch.zeros(16, 2)
    model.policy.set_training_mode(False)
    whole = model.policy.evaluate_actions(obs, actions)[1]
    model.policy.set_training_mode(True)
    parts = torch.cat([model.policy.evaluate_actions(obs[i : i + 1], actions[i : i + 1])[1] for i in range(16)])
    assert torch.allclose(whole, parts, atol=1e-5)  # alone or in a batch, in the rollout or in the update


def test_some_routers_are_taken_and_some_refused():
    taken = set()
    for name, router in example_routers(4).items():
        try:
            check_router(router)
        except ValueError:
            continue
        taken.add(name.split("(")[0])
    assert {"dense", "top_k", "cosine", "deepseek_v3", "relu", "gaussian"} <= taken
    assert taken.isdisjoint({"noisy_top_k", "switch", "gshard", "expert_choice", "base", "hash", "domain", "soft"})
    assert taken < set(ROUTERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "topk"}, "unknown router 'topk'; did you mean 'top_k'"),
        ({"router": "top_k", "router_kwargs": {"top_k": 5}}, "top_k=5 experts cannot be chosen out of 2"),
        ({"router": TopKRouter(3)}, "the router takes 3 features, the gate's input has 4"),
        ({"expert": "mlpp"}, "unknown expert 'mlpp'"),
        ({"expert": "swiglu", "hidden_features": [8, 8]}, "one hidden layer"),
        ({"hidden_features": []}, "at least one hidden layer"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"net_arch": [64]}, "a mixture policy has no net_arch: say hidden_features"),
        ({"gate_input": "everything"}, "gate_input is one of"),
        ({"gate_input": "context"}, "needs context="),
        ({"gate_input": "hidden"}, "needs trunk="),
        ({"gate_input": "context", "context": (2, 9)}, "does not lie in an observation of 4 numbers"),
        ({"gate_input": "context", "context": "task"}, "a key of a dict observation"),
        ({"task_of": "one_hot"}, "reads the context: say context"),
        ({"unseen_task": "guess"}, "unseen_task is one of"),
        ({"balance_coef": -1.0}, "at least 0"),
        ({"share_features_extractor": False}, "share its input"),
        ({"numexperts": 3}, "numexperts"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make("ppo", **options)


@pytest.mark.parametrize(
    ("policy", "space"),
    [
        (MoEActorCriticPolicy, spaces.Dict({"a": spaces.Discrete(2)})),
        (MoESACPolicy, spaces.Discrete(2)),
        (MoETD3Policy, spaces.MultiDiscrete([2, 3])),
        (MoEDQNPolicy, spaces.Box(-1, 1, (2,), np.float32)),
    ],
)
def test_an_action_space_that_a_policy_cannot_serve(policy, space):
    with pytest.raises(ValueError, match=f"{policy.__name__} serves actions in"):
        policy(FLAT, space, lambda _: 1e-3)


def test_state_dependent_exploration_is_refused(make):
    for name in ("ppo", "sac"):
        with pytest.raises(ValueError, match="no state-dependent exploration"):
            make(name, alg_use_sde=True)


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)])
def test_other_discrete_actions(space):
    policy = MoEActorCriticPolicy(FLAT, space, lambda _: 1e-3, num_experts=2, hidden_features=4, router="dense")
    actions, values, log_prob = policy(torch.randn(5, 4))
    assert actions.shape == (5, *space.shape)
    assert torch.allclose(
        policy.evaluate_actions(torch.zeros(5, 4), actions)[0], policy.predict_values(torch.zeros(5, 4))
    )
    assert values.shape == (5, 1)
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("observe", ["dict", "image"])
def test_dict_and_image_observations(make, envs, name, observe):
    env = envs(observe=observe, continuous=name not in ("ppo_discrete", "dqn"))
    context = {"context": "task", "gate_input": "context"} if observe == "dict" else {}
    model = make(name, env, **context).learn(40)
    extractor = type(model.policy.parts()[0].module.features_extractor).__name__
    assert extractor == {"dict": "CombinedExtractor", "image": "NatureCNN"}[observe]
    router = model.policy.parts()[0].network.layer.router
    assert router.in_features == {"dict": 2, "image": 512}[observe]


def test_experts_of_other_kinds(make):
    for expert in ("swiglu", lambda d, out: LoRAExpert(d, out, rank=2)):
        for name in ("ppo", "sac"):
            model = make(name, expert=expert).learn(40)
            assert model.policy.parts()[0].network.pool.num_experts == 2
    deep = make("ppo", hidden_features=[8, 6])
    assert deep.policy.moe.pool.expert_state(0)["expert.pi_w_1"].shape == (1, 8, 6)


def test_shared_heads_and_trunk(make):
    model = make("ppo", own_heads=False, latent_features=6, trunk=[5], gate_input="hidden").learn(32)
    assert model.policy.moe.layer.router.in_features == 5
    assert {name for name, _ in model.policy.moe.head.named_children()} == {"pi", "vf"}
    assert model.policy.log_std.shape == (2,)


def test_side_by_side_networks_compute_what_each_does():
    first, second = DeepMLPExpert(3, [4], 2), DeepMLPExpert(3, [5], 1)
    pair = SideBySideExpert({"a": first, "b": second}, gains={"a": 0.01})
    assert pair.out_features == 3
    assert pair.output_rows == ("a_w_out", "a_b_out", "b_w_out", "b_b_out")
    torch.manual_seed(0)
    drawn = pair.row_specs()["a_w_out"].draw(200, pair.sizes(), torch.empty(0))
    # uniform in +-.01 / sqrt(4)
    assert float(drawn.abs().max()) == pytest.approx(0.005, rel=0.02)
    with pytest.raises(ValueError, match="same features"):
        SideBySideExpert({"a": first, "b": make_expert("mlp", 2, 1, 4, {})})


# -- oracle routing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_two_tasks_is_computed_apart(make, name):
    model = make(name, **{**ORACLE, "num_experts": 1})
    grow(model, task=1)
    part = model.policy.parts()[0]
    obs = torch.randn(6, 4)
    obs[:, 2:] = torch.eye(2)[[0, 1, 1, 0, 1, 0]]
    mixed = part.network(obs, obs)
    assert mixed.weights.argmax(1).tolist() == [0, 1, 1, 0, 1, 0]
    for task, index in ((0, [0, 3, 5]), (1, [1, 2, 4])):
        alone = part.network.layer.expert_output(task, obs[index])
        assert torch.allclose(mixed.outputs[index], alone, atol=1e-6)


def test_tasks_of_several_experts_mask_the_others(make):
    model = make("ppo", **{**ORACLE, "router": "dense", "router_kwargs": {}, "num_experts": 2})
    grow(model, 2, task=1)
    obs = torch.randn(4, 4)
    obs[:, 2:] = torch.eye(2)[[0, 1, 0, 1]]
    weights = model.policy.moe(obs, obs).weights
    assert ((weights > 0) == torch.tensor([[True, True, False, False], [False, False, True, True]] * 2)).all()
    assert torch.allclose(weights.sum(1), torch.ones(4))


def test_an_expert_without_a_task_serves_every_task(make):
    model = make("ppo", **{**ORACLE, "router": "dense", "router_kwargs": {}, "num_experts": 1})
    grow(model)
    obs = torch.randn(2, 4)
    obs[:, 2:] = torch.eye(2)
    assert ((model.policy.moe(obs, obs).weights > 0) == torch.tensor([[True, True], [False, True]])).all()


def test_a_task_without_an_expert(make):
    obs = torch.tensor([[0.1, 0.2, 0.0, 1.0]])
    with pytest.raises(ValueError, match=r"no expert belongs to task 1, .* grow\(model, task="):
        make("ppo", **ORACLE).policy.moe(obs, obs)
    lenient = make("ppo", **{**ORACLE, "num_experts": 1, "unseen_task": "newest"}).policy.moe
    assert lenient(obs, obs).weights.tolist() == [[1.0]]
    with pytest.raises(ValueError, match=r"say task=\.\.\. for the experts to start with"):
        make("ppo", **{**ORACLE, "task": None}).policy.moe(obs, obs)


def test_tasks_by_a_function_and_by_index(make):
    obs = torch.tensor([[0.1, 0.2, 3.0, 1.0]])
    by_index = make("ppo", context=(2, 3), task_of="index", task=3).policy.moe
    assert by_index.tasks(obs).tolist() == [3]
    by_function = make("ppo", task_of=lambda o: (o[:, 3] * 2).long(), task=2).policy.moe
    assert by_function.tasks(obs).tolist() == [2]
    with pytest.raises(ValueError, match="does not know tasks"):
        make("ppo").policy.moe.tasks(obs)


def test_non_finite_observations_raise(make):
    policy = make("ppo").policy
    with pytest.raises(NonFiniteError, match="are not finite"):
        policy.moe(torch.full((2, 4), torch.nan), torch.zeros(2, 4))


# -- auxiliary losses, learning -------------------------------------------------------------------------


def test_an_auxiliary_loss_moves_the_gate_and_is_logged(make, tmp_path):
    """SB3's own loss is switched off (advantages stay 0): whatever moves the gate is the auxiliary loss."""
    moved, columns = {}, {}
    for coefficient in (0.0, 1.0):
        model = make(
            "ppo",
            router="top_k",
            router_kwargs={"top_k": 1},
            balance_coef=coefficient,
            optimizer_kwargs={"weight_decay": 0.0},
            alg_ent_coef=0.0,
            alg_vf_coef=0.0,
        )
        model.rollout_buffer.compute_returns_and_advantage = lambda last_values, dones: None
        rows = model.policy.moe.pool.growable("gate", "weight").live()[0][0]
        with torch.no_grad():
            rows[0, 2] = 1.0  # the third number is 1 in task 0: expert 0 takes everything
        before = rows.detach().clone()
        model.set_logger(configure(str(tmp_path / str(coefficient)), ["csv"]))
        model.learn(96, callback=RoutingLogger())
        moved[coefficient] = rows.detach() - before
        model.logger.close()
        with (tmp_path / str(coefficient) / "progress.csv").open() as file:
            columns[coefficient] = list(csv.DictReader(file))
    assert torch.equal(moved[0.0], torch.zeros_like(moved[0.0]))
    assert float(moved[1.0][0, 2]) < -1e-4  # away from the busy expert
    assert float(moved[1.0][1, 2]) > 1e-4
    assert "train/moe_balance" not in columns[0.0][-1]
    # all to one of two experts, whose probability is p = 1 / (1 + 1/e) = .731: E f p = 2 * 1 * .731 at first
    assert float(columns[1.0][1]["train/moe_balance"]) == pytest.approx(2 * 0.731, abs=0.02)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn"])
def test_auxiliary_losses_are_read_once(make, name):
    model = make(name, balance_coef=0.1, z_coef=0.1).learn(64)
    for part in model.policy.parts():
        losses = part.network.read_losses()
        assert losses["balance"] == pytest.approx(1.0, abs=0.3)  # a dense gate that is nearly uniform: E sum f P = 1
        assert losses["z"] == pytest.approx(np.log(2) ** 2, abs=0.3)  # logsumexp of two logits near 0
        assert part.network.read_losses() == {}


def test_the_critics_auxiliary_loss_does_not_reach_the_action(make):
    model = make("sac", balance_coef=10.0, z_coef=10.0)
    model.policy.set_training_mode(True)
    obs, actions = torch.randn(8, 4), torch.zeros(8, 2, requires_grad=True)
    sum(q.sum() * 0 for q in model.critic(obs, actions)).backward()
    assert float(actions.grad.abs().max()) == 0.0
    gate = model.critic.moe.pool.growable("gate", "weight").live()[0][0]
    assert float(gate.grad.abs().max()) > 0.0


def test_options_survive_a_round_trip():
    options, left = MoEOptions.split({"num_experts": 3, "trunk": [4], "log_std_init": -1.0})
    assert left == {"log_std_init": -1.0}
    assert MoEOptions(**options.as_kwargs()) == options


@pytest.mark.parametrize("router", ["dense", "top_k"])
def test_ppo_learns_to_reach(make, envs, router):
    """Standing still costs about 8 steps * (1 + 0.5) = 12 or more an episode; going there about 4."""
    env = envs(8)
    model = make(
        "ppo",
        env,
        router=router,
        num_experts=2,
        hidden_features=16,
        log_std_init=-0.5,
        optimizer_kwargs={},
        optimizer_class=torch.optim.Adam,
        alg_n_steps=32,
        alg_batch_size=64,
        alg_n_epochs=8,
        alg_learning_rate=3e-3,
        alg_gamma=0.9,
    )
    assert isinstance(model, PPO)
    before = evaluate_policy(model, env, 16, warn=False)[0]
    model.learn(6000)
    assert evaluate_policy(model, env, 16, warn=False)[0] > -6.0 > before
