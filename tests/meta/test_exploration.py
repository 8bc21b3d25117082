"""Meta-RL by inference, in PointGoals: transitions by hand, a planner that reaches goals it was never told of."""

import gymnasium as gym
import modmoe_envs  # noqa: F401  # registers the environments
import pytest
import torch
from torch import Tensor, nn

from modmoe.meta import PointMixture, TaskBatch
from modmoe.meta.exploration import RandomHeadings, RewardPlanner, Transitions, collect, headings

NUM_TASKS = 24


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point_goals(num_tasks: int = NUM_TASKS):
    return gym.make_vec("modmoe/PointGoals-v0", num_tasks, vectorization_mode="vector_entry_point", context="hidden")


def walks(num_tasks: int, seed: int, steps: int = 20) -> Transitions:
    return collect(point_goals(num_tasks), steps, RandomHeadings(2, 5, seeded(seed)), seed=seed, state_size=2)


def test_a_batch_by_hand():
    states = torch.tensor([[[0.0, 0.0], [0.2, 0.0], [0.2, 0.2]]])
    actions = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    after = torch.tensor([[[0.2, 0.0], [0.2, 0.2], [0.2, 0.2]]])
    done = Transitions(states, actions, torch.tensor([[-3.0, -2.0, -1.0]]), after)
    batch = done.task_batch(2)
    assert batch.context_x[0].tolist() == [[0, 0, 1, 0], pytest.approx([0.2, 0, 0, 1])]
    assert batch.context_y[0].tolist() == [[-3], [-2]]
    assert batch.target_y is not None
    assert batch.target_y[0].tolist() == [[-1]]
    change = done.task_batch(0, "change")
    assert change.context_x.shape == (1, 0, 4)
    torch.testing.assert_close(change.target_y, 0.2 * actions)
    mixed = done.task_batch(1, generator=seeded())
    assert sorted(torch.cat([mixed.context_y, mixed.target_y], 1).flatten().tolist()) == [-3, -2, -1]
    assert done.then(done).rewards.tolist() == [[-3, -2, -1] * 2]


def test_what_is_collected_is_what_happened():
    env = point_goals()
    done = collect(env, 20, RandomHeadings(2, 4, seeded()), seed=3, state_size=2)
    goals = torch.tensor(env.world.goals).float()
    assert done.states.shape == (NUM_TASKS, 20, 2)
    torch.testing.assert_close(done.next_states[:, :-1], done.states[:, 1:])
    torch.testing.assert_close(done.next_states, (done.states + 0.2 * done.actions).clamp(-2, 2))
    torch.testing.assert_close(done.rewards, -(done.next_states - goals[:, None]).norm(dim=2))
    assert (done.actions[:, :4] == done.actions[:, :1]).all()  # a heading is held for four steps
    assert (done.actions[:, 3] != done.actions[:, 4]).any(1).all()
    again = collect(point_goals(), 20, RandomHeadings(2, 4, seeded()), seed=3, state_size=2)
    assert torch.equal(again.rewards, done.rewards)
    assert collect(point_goals(), 2, RandomHeadings(2, 4, seeded()), seed=3).states.shape[2] == 4


def test_history_goes_on_in_the_same_tasks():
    env, shown = point_goals(3), []
    first = collect(env, 20, RandomHeadings(2, 5, seeded()), seed=0, state_size=2)
    goals = env.world.goals.copy()

    def still(history: Transitions, states: Tensor) -> Tensor:
        shown.append(history)
        return torch.zeros(3, 2)

    second = collect(env, 2, still, options={"goal": goals}, history=first, state_size=2)
    assert [history.num_steps for history in shown] == [20, 21]
    assert torch.equal(shown[0].rewards, first.rewards)
    assert second.num_steps == 2
    assert torch.equal(shown[1].rewards[:, 20], second.rewards[:, 0])
    assert (env.world.goals == goals).all()


def exact(batch: TaskBatch) -> PointMixture:
    """One who knows the rules: goals on a grid, weighted by how well they explain the rewards of the context."""
    side = torch.linspace(-1.6, 1.6, 65)
    goals = torch.cartesian_prod(side, side)

    def rewards(x: Tensor) -> Tensor:
        after = (x[..., :2] + 0.2 * x[..., 2:]).clamp(-2, 2)
        return -torch.cdist(after, goals)

    errors = rewards(batch.context_x) - batch.context_y
    weights = (-errors.square().sum(1) / (2 * 0.05**2)).softmax(1)
    mean = torch.einsum("bg,bng->bn", weights, rewards(batch.target_x))[:, None, :, None, None]
    return PointMixture(mean, torch.ones_like(mean))


def test_a_planner_with_an_exact_model_finds_every_goal():
    done = collect(point_goals(), 20, RewardPlanner(exact, headings(16), 3, seeded()), seed=0, state_size=2)
    assert (done.rewards[:, -1] > -0.2).all()  # within a stride
    assert (done.rewards[:, 15] > -0.4).float().mean() > 0.9
    random = collect(point_goals(), 20, RandomHeadings(2, 5, seeded()), seed=0, state_size=2)
    assert done.rewards.sum(1).mean() > random.rewards.sum(1).mean() + 8


class SmallProcess(nn.Module):
    """A conditional neural process of the plainest kind: the mean of embedded context points, and a decoder."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64))
        self.decode = nn.Sequential(nn.Linear(68, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, batch: TaskBatch) -> PointMixture:
        code = self.encode(torch.cat([batch.context_x, batch.context_y], 2)).mean(1, keepdim=True)
        wide = code.expand(-1, batch.target_x.shape[1], -1)
        mean = self.decode(torch.cat([wide, batch.target_x], 2))[:, None, :, None]
        return PointMixture(mean, torch.full_like(mean, 0.1))


def test_a_learned_model_infers_the_goal_from_rewards():
    torch.manual_seed(0)
    model, generator = SmallProcess(), seeded(1)
    done = walks(1024, seed=100)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(800):
        rows = torch.randint(1024, (64,), generator=generator)
        some = Transitions(done.states[rows], done.actions[rows], done.rewards[rows], done.next_states[rows])
        batch = some.task_batch(int(torch.randint(2, 19, (1,), generator=generator)), "reward", generator)
        assert batch.target_y is not None
        loss = -model(batch).log_marginal(batch.target_y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    env = point_goals()
    explored = collect(env, 10, RandomHeadings(2, 5, seeded(2)), seed=5, state_size=2)
    goals = {"goal": env.world.goals.copy()}
    planner = RewardPlanner(model, headings(16))
    planned = collect(env, 20, planner, options=goals, history=explored, state_size=2).rewards
    random = collect(env, 20, RandomHeadings(2, 5, seeded(3)), options=goals, state_size=2).rewards
    # distances to the goal at the end: about .5 and 1.7
    assert planned[:, -1].mean() > -0.8
    assert random[:, -1].mean() < -1.3


def test_candidates():
    found = headings(4, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5], [0, 0]]))


def test_bad_input():
    done = walks(2, 0, steps=3)
    with pytest.raises(ValueError, match="num_context is one of 0 to 2, got 3"):
        done.task_batch(3)
    with pytest.raises(ValueError, match="unknown outcome 'value', choose from reward, change"):
        done.task_batch(1, "value")
    with pytest.raises(ValueError, match="an episode ended after 20 steps, 25 were asked for"):
        walks(2, 0, steps=25)
    with pytest.raises(ValueError, match="hold is 1 or more"):
        RandomHeadings(2, 0)
    with pytest.raises(ValueError, match=r"candidates are \(J, A\)"):
        RewardPlanner(exact, torch.zeros(0, 2))
