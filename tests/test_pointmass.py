"""The paper on one page: physics, demonstrations, equations by hand and against the stages' copies, practice."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pointmass
import stage2
from exercises import appendix_e
from pointmass import Config
from results import ablations
from tokens import StepsToGo

ROOT = Path(__file__).parents[1]


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
    assert obs.shape == (len(data["pos"]), 7)
    torch.testing.assert_close(obs[:, :4].mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(obs[:, :4].std(0), torch.ones(4), atol=1e-3, rtol=0)
    at_goal = agent.observe(data["pos"], data["vel"], data["pos"])
    assert torch.equal(at_goal[:, :2], at_goal[:, 4:6])  # the goal in the position's units
    assert (at_goal[:, 6] == 0).all()
    inside = pointmass.reached(data["pos"], data["goal"])
    assert torch.equal(obs[:, 6] < 1, inside) and 0 < inside.float().mean() < 0.05


def test_the_policy_does_not_see_the_radii(agent):
    obs = torch.randn(4, 7)
    other = torch.cat([obs[:, :6], obs[:, 6:] + 1], 1)
    action = torch.randn(4, 2)
    assert torch.equal(agent.log_prob(obs, action), agent.log_prob(other, action))
    assert not torch.equal(agent.d(obs), agent.d(other))


def test_log_prob_is_the_gaussian_density(agent):
    obs, action = torch.randn(5, 7), torch.randn(5, 2)
    with torch.no_grad():
        mean, raw = agent.policy(obs[:, :6]).chunk(2, -1)
        scale = (1 + raw.exp()).log() + 0.01
        expected = (-0.5 * ((action - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        torch.testing.assert_close(agent.log_prob(obs, action), expected)


def test_d_is_the_expected_left_edge(data):
    agent = pointmass.Agent(data, 4)  # edges 0 35 70 105
    final_distance(agent, [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)])
    assert agent.d(torch.randn(3, 7)).tolist() == pytest.approx([0.3 * 35 + 0.2 * 70 + 0.1 * 105] * 3)  # 35 [Eq. 1]
    final_distance(agent, [100.0, 0.0, 0.0, 0.0])
    assert agent.d(torch.randn(1, 7)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bins", [50, 140, 4])
def test_labels_and_d_agree_with_the_foundation_models_tokens(data, bins):
    torch.manual_seed(0)
    agent, tokens = pointmass.Agent(data, bins), StepsToGo(pointmass.HORIZON, bins)
    steps = torch.arange(2 * pointmass.HORIZON)
    assert torch.equal(pointmass.bin_of(steps, bins), tokens.encode(steps)[:, 0])
    obs = torch.randn(len(steps), 7)
    torch.testing.assert_close(agent.d(obs), agent.distance(obs).softmax(-1) @ tokens.edges)


# --- the detector -----------------------------------------------------------------------------------------------------
def calibrated(agent: pointmass.Agent, d: list[float], steps: list[int], monkeypatch, precision: float = 0.9) -> float:
    """s of held-out observations with these d and labels; episode 3 trains, and would move s."""
    n = len(d)
    data = {key: torch.zeros(2 * n, 2) for key in ("pos", "vel", "goal")}
    data |= {"steps_to_go": torch.tensor([*steps, *[9] * n]), "episode": torch.tensor([*[10] * n, *[3] * n])}
    monkeypatch.setattr(pointmass.Agent, "d", lambda self, obs: torch.tensor(d[: len(obs)] + [0.0] * (len(obs) - n)))
    return pointmass.calibrate(agent, data, precision)


def test_calibration_takes_the_largest_s_of_the_precision(agent, monkeypatch):
    d, steps = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 0, 1, 0, 0, 2]
    assert calibrated(agent, d, steps, monkeypatch, 0.8) == pytest.approx(0.5)  # 1 1 2/3 3/4 4/5 4/6
    assert calibrated(agent, d, steps, monkeypatch, 0.7) == pytest.approx(0.5)
    assert calibrated(agent, d, steps, monkeypatch, 0.9) == pytest.approx(0.2)
    shuffled = [(d[k], steps[k]) for k in (3, 0, 5, 1, 4, 2)]
    assert calibrated(agent, *map(list, zip(*shuffled, strict=True)), monkeypatch, 0.8) == pytest.approx(0.5)


def test_a_detector_that_cannot_tell_never_fires(agent, monkeypatch):
    assert calibrated(agent, [0.1, 0.2], [1, 0], monkeypatch) == 0


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


def true_end(d: Tensor, truth: Tensor) -> Tensor:
    return truth


@pytest.mark.parametrize("end", ["detector", "ground-truth"])
def test_rewards_are_differences_of_d_and_telescope(agent, end):
    threshold = 64.0  # the untrained d is about 69 everywhere: some episodes end, others do not
    torch.manual_seed(1)
    for p in agent.distance.parameters():
        p.data *= 2
    ends = true_end if end == "ground-truth" else lambda d, truth: d <= threshold
    b = pointmass.rollout(agent, agent, 64, torch.Generator().manual_seed(2), ends)
    reward, valid, n_steps = pointmass.rewards(b["d"]), b["valid"], b["valid"].sum(1)
    assert torch.equal(reward, stage2.rewards(b["d"]))  # [Eq. 2]
    with torch.no_grad():
        torch.testing.assert_close(agent.d(b["obs"]), b["d"][:, :-1], atol=1e-4, rtol=0)
    assert (reward[~valid] == 0).all() and (reward[valid] != 0).any()
    assert torch.equal(valid.int().sort(1, descending=True).values, valid.int())  # once over, over
    assert torch.equal(b["truth"], pointmass.reached(b["pos"], b["goal"][:, None]))
    returns = pointmass.monte_carlo_returns(reward, 1.0)
    over = torch.where(n_steps < valid.shape[1])[0]
    assert 0 < len(over) < 64
    for i in over.tolist():
        assert returns[i, 0].item() == pytest.approx((b["d"][i, 0] - b["d"][i, n_steps[i]]).item(), abs=1e-3)
        assert torch.equal(b["pos"][i, n_steps[i]], b["pos"][i, -1])  # frozen at the end
    ended = b["d"] <= threshold if end == "detector" else b["truth"]
    assert ended[over, -1].all()
    assert not (ended[:, 1:-1] & valid[:, 1:]).any()  # and not before


def test_rollout_is_repeatable_and_moves_by_the_dynamics(agent):
    a, b = (pointmass.rollout(agent, agent, 8, torch.Generator().manual_seed(4), true_end) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    move = a["pos"][:, 1] - a["pos"][:, 0]  # from rest
    torch.testing.assert_close(move, 55 * (a["action"][:, 0] * agent.action_std + agent.action_mean), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(a["obs"][:, 1, :2], (a["pos"][:, 1] - agent.pos_mean) / agent.pos_std)


def test_the_loss_agrees_with_stage2s(rng):
    log_prob, returns = torch.randn(2, 9, generator=rng)
    assert torch.equal(pointmass.reinforce_loss(log_prob, returns, 0.1), stage2.reinforce_loss(log_prob, returns, 0.1))


# --- learning ---------------------------------------------------------------------------------------------------------
def losses(agent: pointmass.Agent, data: dict[str, Tensor]) -> tuple[float, float]:
    """L_BC and L_steps_to_go over all of `data`."""
    obs = agent.observe(data["pos"], data["vel"], data["goal"])
    action = (data["action"] - agent.action_mean) / agent.action_std
    with torch.no_grad():
        steps = F.cross_entropy(agent.distance(obs), pointmass.bin_of(data["steps_to_go"], len(agent.edges)))
        return -agent.log_prob(obs, action).mean().item(), steps.item()


def test_stage1_lowers_both_losses():
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    data = pointmass.demonstrate(300, rng)
    held_out = {k: v[data["episode"] % 10 == 0] for k, v in data.items()}
    agent = pointmass.Agent(data, 50)
    before = losses(agent, held_out)
    pointmass.stage1(agent, data, Config(episodes=300, bins=50, stage1_updates=300), rng)
    after = losses(agent, held_out)
    assert after[0] < before[0] - 0.3 and after[1] < before[1] - 0.3


def test_stage2_trains_the_policy_and_freezes_the_reward(agent):
    cfg = Config(stage2_steps=2 * 2048 + 4480 * 2, success="ground-truth", keep_optimizer=False)
    before = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4)
    rows = pointmass.stage2(agent, optimizer, 1.0, cfg, torch.Generator().manual_seed(0))
    assert len(rows) >= 3 and all(math.isfinite(v) for row in rows for v in row.values())
    changed = {k.split(".")[0] for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"policy"}
    assert rows[0]["env_steps"] >= 2048 and rows[0]["episodes"] >= 32


def test_practice_keeps_the_best_policy(agent, monkeypatch):
    """Mean steps 10, 10, 10, 40, 40: the policy behind the third iteration stays."""
    lengths, weights = [10, 10, 10, 40, 40], []
    plain = pointmass.rollout

    def fake(actor, reward_model, n, rng, ends):
        weights.append(actor.policy[0].weight.detach().clone())  # as the iteration begins
        steps = lengths[len(weights) - 1]
        b = plain(actor, reward_model, 2400 // steps, rng, lambda d, truth: torch.zeros_like(truth))
        cut = {k: b[k][:, :steps] for k in ("obs", "action", "valid")}
        return b | cut | {"d": b["d"][:, : steps + 1], "truth": b["truth"][:, : steps + 1]}

    monkeypatch.setattr(pointmass, "rollout", fake)
    cfg = Config(stage2_steps=4 * 2400 + 2 * 2048)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4)
    rows = pointmass.stage2(agent, optimizer, 1.0, cfg, torch.Generator().manual_seed(0))
    assert [row["mean_steps"] for row in rows] == lengths
    assert torch.equal(agent.policy[0].weight, weights[3]) and not torch.equal(weights[3], weights[4])


# --- the whole page ---------------------------------------------------------------------------------------------------
TINY = "Config(episodes=200, stage1_updates=30, stage2_steps=10_000)"


def test_main_writes_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pointmass.main(Config(seed=3, episodes=200, stage1_updates=30, stage2_steps=10_000, success_threshold=1.0))
    (out,) = Path("runs").iterdir()
    flags = "episodes=200-stage1_updates=30-stage2_steps=10000-success_threshold=1.0"
    assert out.name == f"pointmass-toy-s3-{flags}" and str(out) in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"figure9.png", "metrics.csv", "summary.json"}
    told = json.loads((out / "summary.json").read_text())
    assert told["success_threshold"] == 1.0 and told["seed"] == 3 and told["stage1_episodes"] == 200
    assert told["stage2_success_low"] <= told["stage2_success"] <= told["stage2_success_high"]
    header, *rows = (out / "metrics.csv").read_text().splitlines()
    assert header == "env_steps,episodes,mean_steps,true_at_end,detected,return_mean"
    assert len(rows) >= 1 and int(rows[-1].split(",")[0]) == told["stage2_env_steps"]


@pytest.mark.slow
def test_both_stages_beat_the_demonstrations():
    """The detector alone, no ground truth: practice makes the clone several times faster, and the detector is right."""
    rng = torch.manual_seed(0)
    cfg = Config(stage2_steps=100_000)
    data = pointmass.demonstrate(cfg.episodes, rng)
    agent = pointmass.Agent(data, cfg.bins)
    optimizer = pointmass.stage1(agent, data, cfg, rng)
    s = pointmass.calibrate(agent, data)
    clone = pointmass.evaluate(agent, rng, 500)
    rows = pointmass.stage2(agent, optimizer, s, cfg, rng)
    practised = pointmass.evaluate(agent, rng, 500)
    assert 0.65 < clone["success"] < 0.9 and clone["mean_steps"] > 60
    assert practised["success"] > 0.98 and practised["mean_steps"] < clone["mean_steps"] / 4
    assert practised["success_low"] < practised["success"] <= practised["success_high"]
    assert rows[-1]["detected"] > 0.98 and rows[-1]["true_at_end"] > 0.8


@pytest.mark.slow
def test_the_page_is_a_notebook_that_runs(tmp_path):
    """`jupytext --to notebook pointmass.py`, as its docstring says; every cell runs, with fewer steps."""
    pytest.importorskip("jupytext")
    page = (ROOT / "pointmass.py").read_text()
    command = "jupytext --to notebook pointmass.py"
    assert command in page
    (tmp_path / "pointmass.py").write_text(page.replace("main(cfg)\n", f"main({TINY})\n"))
    subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    notebook = json.loads((tmp_path / "pointmass.ipynb").read_text())
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown" and kinds.count("code") >= 9
    execute = [sys.executable, "-m", *["jupytext", "--set-kernel", "python3", "--execute", "--to", "notebook", "pointmass.py"]]
    subprocess.run(execute, cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("runs/pointmass-toy-s0-*/figure9.png"))
    printed = "".join(str(cell.get("outputs")) for cell in json.loads((tmp_path / "pointmass.ipynb").read_text())["cells"])
    assert "stage2_success" in printed


# --- ablations and Appendix E -----------------------------------------------------------------------------------------
SMALL = "--episodes 200 --stage1-updates 20 --stage2-steps 4096"


def test_a_setting_is_what_the_flags_change():
    assert ablations.changes_of("") == {}
    assert ablations.changes_of("--gamma 0 --no-keep-optimizer") == {"gamma": 0.0, "keep_optimizer": False}
    for flags in ablations.PUBLISHED:
        assert bool(ablations.changes_of(flags)) == bool(flags)
    with pytest.raises(SystemExit):
        ablations.changes_of("--gama 0")


def test_a_row_of_an_ablation_is_the_run_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pointmass, "HORIZON", 12)
    row, metrics = ablations.run(SMALL, 5)
    cfg = Config(seed=5, episodes=200, stage1_updates=20, stage2_steps=4096)
    rng = torch.manual_seed(5)
    data = pointmass.demonstrate(cfg.episodes, rng)
    agent = pointmass.Agent(data, cfg.bins)
    optimizer = pointmass.stage1(agent, data, cfg, rng)
    s = pointmass.calibrate(agent, data)
    pointmass.evaluate(agent, rng)
    assert metrics == pointmass.stage2(agent, optimizer, s, cfg, rng)
    assert row["stage2_success"] == pointmass.evaluate(agent, rng)["success"] and row["success_threshold"] == s
    assert {"flags", "seed", "stage1_mean_steps", "stage2_mean_steps", "stage2_precision", "stage2_recall"} <= row.keys()


def test_the_detectors_precision_and_recall_by_hand(monkeypatch):
    """Five episodes: right, wrong, arrived unseen, never there, arrived unseen and detected a step later."""
    d = torch.tensor([[9, 1, 1], [9, 1, 1], [9, 9, 9], [9, 9, 9], [9, 9, 1.0]])
    truth = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()
    monkeypatch.setattr(pointmass, "rollout", lambda *_: {"d": d, "truth": truth})
    assert ablations.detector(None, None, 2.0) == pytest.approx({"precision": 2 / 3, "recall": 2 / 3})


def test_a_question_of_ones_own(tmp_path, monkeypatch, capsys):
    def run(flags, seed):
        row = {"flags": flags, "seed": seed, "stage2_success": 0.5 + seed / 10, "stage2_mean_steps": 20.0 + seed}
        row |= {"stage2_precision": 0.9, "stage2_recall": 1.0}
        return row, [{"env_steps": 2048, "true_at_end": 0.5, "mean_steps": 20.0}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "run", run)
    ablations.main(ablations.Args(flag=("--bins 10",), seeds=2))
    told = capsys.readouterr().out
    assert "| `--bins 10` | 2 | 0.550 (0.500-0.600) | 20.5 (20.0-21.0) | 0.90 (0.90-0.90) |" in told
    assert "| default | 2 |" in told
    out = Path("runs/ablations/bins=10.csv")
    assert out.exists() and out.with_suffix(".png").stat().st_size > 10_000
    assert len(out.read_text().splitlines()) == 5
    ablations.main(ablations.Args(flag=("--bins 10",), seeds=3))  # goes on with the third seed
    assert "| `--bins 10` | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_parts_of_appendix_e_add_up(rng, gamma):
    value = -50 * torch.rand(9, generator=rng)
    reward = pointmass.rewards(-value[None])[0]
    task, shaping = appendix_e.parts_of_reward(value, gamma)
    torch.testing.assert_close(task + shaping, reward, atol=1e-4, rtol=0)
    returns = pointmass.monte_carlo_returns(reward[None], gamma)[0]
    torch.testing.assert_close(sum(appendix_e.parts_of_return(value, gamma)), returns, atol=1e-4, rtol=0)


def test_the_picture_of_appendix_e(agent, tmp_path):
    b = pointmass.rollout(agent, agent, 16, torch.Generator().manual_seed(0), true_end)
    b["truth"][3, -1], b["truth"][4, -1] = True, False
    appendix_e.draw(b, 0.9, tmp_path / "new" / "appendix_e.png")
    assert (tmp_path / "new" / "appendix_e.png").stat().st_size > 20_000
