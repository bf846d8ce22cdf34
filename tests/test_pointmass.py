"""The paper on one page: physics, demonstrations, equations against hand-computed numbers, and against the stages' copies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pointmass
import stage2
from model import StepsToGo
from pointmass import Config


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return pointmass.demonstrate(10_000, torch.Generator().manual_seed(0))


@pytest.fixture
def agent(data) -> pointmass.Agent:
    torch.manual_seed(0)
    return pointmass.Agent(data, 50)


def final_distance(agent: pointmass.Agent, logits: list[float]) -> None:
    """Make the distance network answer with these logits whatever it sees."""
    with torch.no_grad():
        agent.distance[-1].weight.zero_()
        agent.distance[-1].bias.copy_(torch.tensor(logits))


# --- the task ---------------------------------------------------------------------------------------------------------
def test_closed_form_step_equals_the_ten_substeps(rng):
    pos, vel, action = (torch.randn(100, 2, generator=rng, dtype=torch.double) for _ in range(3))
    new_pos, new_vel = pos.clone(), vel.clone()
    for _ in range(10):
        new_vel += action
        new_pos += new_vel
    got_pos, got_vel = pointmass.step(pos, vel, action)
    torch.testing.assert_close(got_pos, new_pos)
    torch.testing.assert_close(got_vel, new_vel)


def test_reached_is_a_disc():
    goal = torch.zeros(4, 2)
    pos = torch.tensor([[0.149, 0.0], [0.151, 0.0], [0.11, 0.11], [0.10, 0.10]])  # 0.1556 and 0.1414 away
    assert pointmass.reached(pos, goal).tolist() == [True, False, False, True]


def test_straight_pd_takes_twelve_and_a_half_steps(rng):
    n = 4000
    pos, goal = pointmass.uniform(n, pointmass.START, rng), pointmass.uniform(n, pointmass.GOAL, rng)
    vel, steps, alive = torch.zeros_like(pos), torch.zeros(n), torch.ones(n, dtype=torch.bool)
    for _ in range(pointmass.HORIZON):
        pos, vel = pointmass.step(pos, vel, pointmass.expert(pos, vel, goal))
        steps += alive
        alive &= ~pointmass.reached(pos, goal)
    assert not alive.any()
    assert 12.2 < steps.mean() < 12.8
    assert 2.0 < steps.std() < 3.0


# --- demonstrations ---------------------------------------------------------------------------------------------------
def test_demonstrations_have_the_statistics_of_the_authors_dataset(data):
    length = torch.bincount(data["episode"], minlength=10_000)
    length = length[length > 0].float()
    assert abs(length.mean() - 76.9) < 1.5 and abs(length.std() - 30.2) < 1.5
    for q, expected in ((0.05, 16), (0.5, 86), (0.95, 114)):
        assert abs(length.quantile(q) - expected) <= 2
    assert length.min() >= 10
    torch.testing.assert_close(data["action"].std(0), torch.full((2,), 8.8e-5), atol=0, rtol=0.02)
    torch.testing.assert_close(data["vel"].std(0), torch.full((2,), 5.3e-3), atol=0, rtol=0.02)
    assert 1.25 < data["pos"].abs().max() < 1.45 and 4e-4 < data["action"].abs().max() < 5.5e-4
    assert abs((data["steps_to_go"] >= 50).float().mean() - 0.41) < 0.02


def test_labels_count_down_to_zero_at_the_goal(data):
    first = torch.ones(len(data["episode"]), dtype=torch.bool)
    first[1:] = data["episode"][1:] != data["episode"][:-1]
    last = torch.cat([first[1:], torch.tensor([True])])
    length = torch.bincount(data["episode"])
    assert torch.equal(data["steps_to_go"][first], length[length > 0] - 1)
    assert (data["steps_to_go"][1:] == data["steps_to_go"][:-1] - 1)[~first[1:]].all()
    assert (data["steps_to_go"][last] == 0).all()
    reached = pointmass.reached(data["pos"], data["goal"])
    assert reached[last].all()  # the final observation is in
    assert not reached[~last & ~first].any()  # and nothing after it; a start may lie in its goal
    assert (data["vel"][first] == 0).all()


def test_demonstrations_obey_the_dynamics(data):
    same = data["episode"][1:] == data["episode"][:-1]
    pos, vel = pointmass.step(data["pos"][:-1], data["vel"][:-1], data["action"][:-1])
    torch.testing.assert_close(pos[same], data["pos"][1:][same])
    torch.testing.assert_close(vel[same], data["vel"][1:][same])


def test_the_same_seed_gives_the_same_demonstrations():
    first, second, other = (pointmass.demonstrate(50, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["pos"].shape != other["pos"].shape or not torch.equal(first["pos"], other["pos"])


# --- the networks -----------------------------------------------------------------------------------------------------
def test_observations_and_actions_are_z_scored(agent, data):
    obs = agent.observe(data["pos"], data["vel"], data["goal"])
    assert obs.shape == (len(data["pos"]), 6)
    torch.testing.assert_close(obs[:, :4].mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(obs[:, :4].std(0), torch.ones(4), atol=1e-3, rtol=0)
    at_goal = agent.observe(data["pos"], data["vel"], data["pos"])
    assert torch.equal(at_goal[:, :2], at_goal[:, 4:])  # the goal in the position's units


def test_log_prob_is_the_gaussian_density(agent):
    obs, action = torch.randn(5, 6), torch.randn(5, 2)
    with torch.no_grad():
        mean, raw = agent.policy(obs).chunk(2, -1)
        scale = (1 + raw.exp()).log() + 0.01
        expected = (-0.5 * ((action - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        torch.testing.assert_close(agent.log_prob(obs, action), expected)


def test_d_is_the_expected_left_edge(data):
    agent = pointmass.Agent(data, 4)  # edges 0 35 70 105
    final_distance(agent, [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)])
    assert agent.d(torch.randn(3, 6)).tolist() == pytest.approx([0.3 * 35 + 0.2 * 70 + 0.1 * 105] * 3)  # 35 [Eq. 1]
    final_distance(agent, [100.0, 0.0, 0.0, 0.0])
    assert agent.d(torch.randn(1, 6)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bins", [50, 140, 4])
def test_labels_and_loss_agree_with_the_foundation_models_tokens(data, bins):
    torch.manual_seed(0)
    agent, tokens = pointmass.Agent(data, bins), StepsToGo(pointmass.HORIZON, bins)
    steps = torch.arange(2 * pointmass.HORIZON)
    obs = torch.randn(len(steps), 6)
    expected = F.cross_entropy(agent.distance(obs), tokens.encode(steps)[:, 0], reduction="none")
    torch.testing.assert_close(agent.steps_to_go_loss(obs, steps), expected)
    torch.testing.assert_close(agent.d(obs), agent.distance(obs).softmax(-1) @ tokens.edges)


def test_label_bug_gives_no_gradient_beyond_the_bins(agent):
    bug, right = [(49, True, True), (50, True, False), (120, True, False)], [(50, False, True), (200, False, True)]
    for steps, label_bug, learns in bug + right:
        agent.zero_grad()
        agent.steps_to_go_loss(torch.randn(8, 6), torch.full((8,), steps), label_bug).mean().backward()
        gradient = sum(p.grad.abs().sum() for p in agent.distance.parameters())
        assert (gradient > 0) == learns, (steps, label_bug)


def test_label_bug_uses_the_raw_step_count_as_class(agent):
    obs, steps = torch.randn(3, 6), torch.tensor([0, 28, 49])
    bug = F.cross_entropy(agent.distance(obs), steps, reduction="none")
    torch.testing.assert_close(agent.steps_to_go_loss(obs, steps, label_bug=True), bug)
    right = F.cross_entropy(agent.distance(obs), torch.tensor([0, 10, 17]), reduction="none")  # bins of 2.8 steps
    torch.testing.assert_close(agent.steps_to_go_loss(obs, steps), right)


# --- rollouts and returns ---------------------------------------------------------------------------------------------
def test_monte_carlo_returns():
    reward = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, -8.0]])
    assert pointmass.monte_carlo_returns(reward, 0.5).tolist() == [[3, 4, 4], [-2, -4, -8]]
    assert pointmass.monte_carlo_returns(reward, 1.0).tolist() == [[7, 6, 4], [-8, -8, -8]]
    assert pointmass.monte_carlo_returns(reward, 0.0).tolist() == reward.tolist()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_agree_with_stage2s(rng, gamma):
    reward = torch.randn(7, 30, generator=rng)
    assert torch.equal(pointmass.monte_carlo_returns(reward, gamma), stage2.monte_carlo_returns(reward, gamma))


@pytest.mark.parametrize("end", ["detector", "ground-truth"])
def test_rewards_are_differences_of_d_and_telescope(agent, end):
    threshold = 64.0  # the untrained d is about 69 everywhere: some episodes end, others do not
    torch.manual_seed(1)
    for p in agent.distance.parameters():
        p.data *= 2
    b = pointmass.rollout(agent, agent, 64, torch.Generator().manual_seed(2), end, threshold)
    reward, valid, n_steps = b["reward"], b["valid"], b["valid"].sum(1)
    with torch.no_grad():
        d = agent.d(b["obs"])  # (n, T); after an episode's end its final observation is repeated
    torch.testing.assert_close(reward[:, :-1], stage2.rewards(d) * valid[:, :-1], atol=1e-4, rtol=0)  # [Eq. 2]
    assert (reward[~valid] == 0).all()
    assert torch.equal(valid.int().sort(1, descending=True).values, valid.int())  # once over, over
    returns = pointmass.monte_carlo_returns(reward, 1.0)
    over = torch.where(n_steps < valid.shape[1])[0]
    assert 0 < len(over) < 64
    for i in over.tolist():
        assert returns[i, 0].item() == pytest.approx((d[i, 0] - d[i, n_steps[i]]).item(), abs=1e-3)
        assert pointmass.reached(b["pos"][i, n_steps[i]], b["goal"][i]) == b["truth"][i]
    if end == "detector":
        assert b["detected"][over].all() and torch.equal(b["detected"], n_steps < pointmass.HORIZON)
        assert (d[over, n_steps[over]] <= threshold).all()
    else:
        assert b["truth"][over].all()


def test_rollout_is_repeatable_and_moves_by_the_dynamics(agent):
    a, b = (pointmass.rollout(agent, agent, 8, torch.Generator().manual_seed(4), "ground-truth", 0.0) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    move = a["pos"][:, 1] - a["pos"][:, 0]  # from rest
    torch.testing.assert_close(move, 55 * (a["action"][:, 0] * agent.action_std + agent.action_mean), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(a["obs"][:, 1, :2], (a["pos"][:, 1] - agent.pos_mean) / agent.pos_std)


# --- learning ---------------------------------------------------------------------------------------------------------
def losses(agent: pointmass.Agent, data: dict[str, Tensor]) -> tuple[float, float]:
    """L_BC and L_steps_to_go over all of `data`."""
    obs, action = agent.observe(data["pos"], data["vel"], data["goal"]), (data["action"] - agent.action_mean) / agent.action_std
    with torch.no_grad():
        return -agent.log_prob(obs, action).mean().item(), agent.steps_to_go_loss(obs, data["steps_to_go"]).mean().item()


def test_stage1_lowers_both_losses():
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    data = pointmass.demonstrate(300, rng)
    held_out = {k: v[data["episode"] % 10 == 0] for k, v in data.items()}
    agent = pointmass.Agent(data, 50)
    before = losses(agent, held_out)
    pointmass.stage1(agent, data, Config(episodes=300, stage1_updates=300), rng)
    after = losses(agent, held_out)
    assert after[0] < before[0] - 0.3 and after[1] < before[1] - 0.3


@pytest.mark.parametrize("freeze", [True, False])
def test_stage2_trains_the_policy_and_freezes_the_reward(agent, freeze):
    cfg = Config(stage2_steps=2 * 2048 + 4480 * 2, success="ground-truth", freeze_reward=freeze, keep_optimizer=False)
    before = copy.deepcopy(agent.state_dict())
    rows = pointmass.stage2(agent, torch.optim.Adam(agent.parameters(), lr=3e-4), cfg, torch.Generator().manual_seed(0))
    assert len(rows) >= 1 and all(math.isfinite(v) for row in rows for v in row.values())
    changed = {k.split(".")[0] for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"policy"} if freeze else {"policy", "distance"})


@pytest.mark.slow
def test_both_stages_beat_the_demonstrations():
    """On less than the full budget, with the notebook's settings of Stage 2: practice makes the clone several times faster."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    cfg = Config(episodes=5000, stage1_updates=6000, stage2_steps=70_000, success="ground-truth", c=1 / 140, gamma=0.9)
    data = pointmass.demonstrate(cfg.episodes, rng)
    agent = pointmass.Agent(data, cfg.bins)
    optimizer = pointmass.stage1(agent, data, cfg, rng)
    clone = pointmass.evaluate(agent, rng, 500)
    pointmass.stage2(agent, optimizer, cfg, rng)
    practised = pointmass.evaluate(agent, rng, 500)
    assert clone["success"] > 0.5 and clone["mean_steps"] > 50
    assert practised["success"] > clone["success"] and practised["mean_steps"] < clone["mean_steps"] / 2
    assert practised["success_low"] < practised["success"] <= practised["success_high"]
