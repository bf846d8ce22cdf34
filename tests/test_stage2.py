"""Stage 2: its equations by hand, REINFORCE against exact enumeration, and what stays frozen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import envs.pointmass
import envs.symmetries
import stage2
from common import UserError, runs, setup
from envs.operator import Operator
from model import EFM
from tests.tiny import small, stage1_run
from tokens import QUESTION_ACTION


# --- the equations ----------------------------------------------------------------------------------------
def test_rewards():
    d = torch.tensor([[10.0, 8.0, 9.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert stage2.rewards(d).tolist() == [[2, -1, 7], [0, 0, 0]]  # [Eq. 2]


def test_monte_carlo_returns():
    reward = torch.tensor([[2.0, -1.0, 8.0], [1.0, 0.0, 0.0]])
    assert stage2.monte_carlo_returns(reward, 0.5).tolist() == [[3.5, 3, 8], [1, 0, 0]]
    assert stage2.monte_carlo_returns(reward, 0.0).tolist() == reward.tolist()
    assert stage2.monte_carlo_returns(reward, 1.0).tolist() == [[9, 7, 8], [1, 0, 0]]


def test_returns_telescope_without_discount(rng):
    d = torch.rand(6, 20, generator=rng) * 100
    returns = stage2.monte_carlo_returns(stage2.rewards(d), 1.0)
    torch.testing.assert_close(returns, d[:, :-1] - d[:, -1:], atol=1e-3, rtol=0)


# Appendix E: with V := -d, the value of the demonstrations' policy at a reward of -1 a step
GAMMAS = [0.0, 0.5, 0.9, 1.0]


def appendix_e(value: Tensor, gamma: float) -> Tensor:
    """Its last formula, (1 - gamma) Σ_{i>=t} gamma^(i-t) V(o_i+1) - V(o_t): float (n, T + 1) -> (n, T)."""
    following = value[:, 1:]
    sums = torch.zeros_like(following)
    for t in range(sums.shape[1]):
        for i in range(t, sums.shape[1]):
            sums[:, t] += gamma ** (i - t) * following[:, i]
    return (1 - gamma) * sums - value[:, :-1]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_appendix_e(rng, gamma):
    """Equation 3: r = (1 - gamma) V(o_t+1) + [gamma V(o_t+1) - V(o_t)], whatever gamma is."""
    value = -20 * torch.rand(8, 13, generator=rng)
    now, following = value[:, :-1], value[:, 1:]
    shaping = gamma * following - now
    reward = (1 - gamma) * following + shaping  # [Eq. 3]
    torch.testing.assert_close(stage2.rewards(-value), reward, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_return_has_a_boundary_term_that_appendix_e_leaves_out(rng, gamma):
    """gamma^(T-t+1) V(o_T+1): what is left of the sum of the shaping at an episode's end."""
    value = -20 * torch.rand(8, 13, generator=rng, dtype=torch.float64)
    returns = stage2.monte_carlo_returns(stage2.rewards(-value), gamma)
    left = torch.arange(12.0, 0, -1)  # T - t + 1
    boundary = gamma**left * value[:, -1:]
    torch.testing.assert_close(returns, appendix_e(value, gamma) + boundary, atol=1e-5, rtol=0)
    off = (returns - appendix_e(value, gamma)).abs().amax(0)  # (T,)
    assert bool(off[-1] > 1) == (gamma > 0)  # without the term it is not R
    value[:, -1] = 0  # but where episodes end at the goal
    returns = stage2.monte_carlo_returns(stage2.rewards(-value), gamma)
    torch.testing.assert_close(returns, appendix_e(value, gamma), atol=1e-5, rtol=0)


def test_reinforce_loss():
    log_prob, returns = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True), torch.tensor([3.0, 0.0, -1.5])
    loss = stage2.reinforce_loss(log_prob, returns, 0.2)
    assert loss.item() == pytest.approx(-0.2 * (-3 + 0 + 6) / 3)
    loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([-0.2, 0, 0.1])  # up where the return is positive, down where negative


def test_detect_success():
    assert stage2.detect_success(torch.tensor([2.9, 3.0, 3.1, 0.0]), 3.0).tolist() == [
        True,
        True,
        False,
        True,
    ]


# --- the gradient -----------------------------------------------------------------------------------------
RANGES = [(0, 3), (1, 4)]
ANSWERS = torch.tensor(list(itertools.product(range(3), range(1, 4))))
VALUE = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.0, 4.0, -3.0])  # the bandit's return of each answer


def bandit() -> tuple[EFM, dict[str, Tensor], list[str]]:
    """One observation, one question, nine answers of two tokens."""
    policy = small("state", 0)
    return policy, {"state": torch.randn(1, 5, 2)}, [QUESTION_ACTION.format("move to the red goal")]


def gradient(policy: EFM, loss: Tensor) -> Tensor:
    policy.zero_grad()
    loss.backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in policy.parameters()]).clone()


def test_the_expected_reinforce_gradient_is_the_gradient_of_the_expected_return():
    policy, obs, prompt = bandit()
    c = 0.05
    everywhere = {"state": obs["state"].expand(9, -1, -1)}
    expected = gradient(policy, -c * (policy.log_prob(everywhere, prompt * 9, ANSWERS, RANGES).exp() * VALUE).sum())  # exact
    got = torch.zeros_like(expected)
    with torch.no_grad():
        p = policy.log_prob(everywhere, prompt * 9, ANSWERS, RANGES).exp()
    for i in range(9):  # each answer's own REINFORCE gradient, as often as the policy gives that answer
        log_prob = policy.log_prob(obs, prompt, ANSWERS[i : i + 1], RANGES)
        got += p[i] * gradient(policy, stage2.reinforce_loss(log_prob, VALUE[i : i + 1], c))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item() + 1e-7, rtol=1e-3)


def test_the_sampled_reinforce_gradient_points_the_same_way(rng):
    policy, obs, prompt = bandit()
    n = 4000
    everywhere = {"state": obs["state"].expand(9, -1, -1)}
    expected = gradient(policy, -(policy.log_prob(everywhere, prompt * 9, ANSWERS, RANGES).exp() * VALUE).sum())
    sampled = {"state": obs["state"].expand(n, -1, -1)}
    tokens, _ = policy.sample(sampled, prompt * n, RANGES, rng)
    returns = VALUE[tokens[:, 0] * 3 + tokens[:, 1] - 1]
    got = gradient(policy, stage2.reinforce_loss(policy.log_prob(sampled, prompt * n, tokens, RANGES), returns, 1.0))
    assert torch.cosine_similarity(got, expected, 0) > 0.97
    assert (got.norm() / expected.norm() - 1).abs() < 0.15


def test_reinforce_learns_the_bandit(rng):
    policy, obs, prompt = bandit()
    optimizer, n = torch.optim.Adam(policy.parameters(), lr=3e-3), 64
    sampled, everywhere = ({"state": obs["state"].expand(k, -1, -1)} for k in (n, 9))
    for _ in range(60):
        tokens, _ = policy.sample(sampled, prompt * n, RANGES, rng)
        returns = VALUE[tokens[:, 0] * 3 + tokens[:, 1] - 1]
        loss = stage2.reinforce_loss(policy.log_prob(sampled, prompt * n, tokens, RANGES), returns, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        p = policy.log_prob(everywhere, prompt * 9, ANSWERS, RANGES).exp()
    assert (p * VALUE).sum() > 3  # a uniform policy gets 0.5, the best answer 4


# --- Algorithm 1 ------------------------------------------------------------------------------------------
def run(tmp_path, monkeypatch, obs: str, **settings) -> tuple[list[EFM], list[dict[str, Tensor]], dict]:
    """A very short Stage 2: policy and reward model after it, their weights before it, the summary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "horizon", 12)
    stage1_run(Path("runs/stage1"), obs)
    loaded, before, load = [], [], setup.load_checkpoint

    def keep(path, env, *beside):
        loaded.append(load(path, env, *beside))
        before.append({k: v.clone() for k, v in loaded[-1].state_dict().items()})
        return loaded[-1]

    monkeypatch.setattr(setup, "load_checkpoint", keep)
    settings = {
        "updates": 2,
        "batch": 32,
        "num_envs": 4,
        "iterations": 6,
        "lr": 1e-3,
        "first_look": 4,
        "eval_episodes": 3,
    } | settings
    stage2.main(stage2.Config(stage1="runs/stage1", out="runs/stage2", **settings))
    return loaded[:2], before[:2], json.loads(Path("runs/stage2/summary.json").read_text())


@pytest.mark.parametrize("obs", ["state", "images"])
def test_an_update_changes_neither_the_reward_model_nor_the_policys_vit(tmp_path, monkeypatch, obs):
    (policy, reward_model), before, summary = run(tmp_path, monkeypatch, obs)
    for key, value in reward_model.state_dict().items():
        assert torch.equal(value, before[1][key]), key
    saved = safetensors.torch.load_file("runs/stage2/reward.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in before[1].items())
    after = policy.state_dict()
    frozen = {k for k in after if torch.equal(after[k], before[0][k])}
    vit = {k for k in after if k.startswith("vision_tower.")}
    assert bool(vit) == (obs == "images")
    assert frozen == vit  # and everything else learns
    assert all(v.isfinite().all() for v in after.values())
    assert summary["env_steps"] >= 6 * 2 * 32 and summary["episodes"] % 4 == 0
    assert 0 <= summary["success_low"] <= summary["success"] <= summary["success_high"] <= 1
    confusion = [summary[k] for k in ("true_positives", "false_positives", "false_negatives", "true_negatives")]
    assert sum(confusion) == summary["eval_episodes"] == 3
    rows = Path("runs/stage2/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 and all(math.isfinite(float(x)) for x in rows[-1].split(","))


def test_practice_of_the_blocks_changes_the_transformers_blocks_and_nothing_else(tmp_path, monkeypatch):
    (policy, _), before, _ = run(tmp_path, monkeypatch, "state", learns="blocks")
    after = policy.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[0][k])} == {k for k in after if ".layers." in k}
    with pytest.raises(UserError, match="--keep-optimizer: .*--learns all"):
        stage2.main(stage2.Config(stage1="runs/stage1", out="runs/again", learns="blocks", keep_optimizer=True))
    # and of its moments, which are of fewer weights than all
    with pytest.raises(UserError, match="--keep-optimizer: the moments of runs/stage2"):
        few = {"updates": 1, "batch": 8, "num_envs": 2, "iterations": 1, "first_look": 2, "learns": "all"}
        stage2.main(stage2.Config(stage1="runs/stage2", out="runs/again", keep_optimizer=True, **few))
    assert not Path("runs/again").exists()


def test_practice_of_a_single_tuple(tmp_path, monkeypatch):
    """Its standard deviation is none: that is not the learning rate's fault."""
    one = {"iterations": 1, "updates": 1, "batch": 1, "num_envs": 1, "first_look": 1, "success_threshold": 1000.0}
    run(tmp_path, monkeypatch, "state", **one)
    row = np.genfromtxt("runs/stage2/metrics.csv", delimiter=",", names=True)
    assert row["env_steps"] == 2 and row["return_std"] == 0  # the first look was the other


def test_numbers_that_are_none_end_practice(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--lr 1e\+30: .*smaller"):
        run(tmp_path, monkeypatch, "state", lr=1e30)
    assert not Path("runs/stage2/summary.json").exists()
    kept = safetensors.torch.load_file("runs/stage2/policy.safetensors")
    assert all(bool(w.isfinite().all()) for w in kept.values())


def test_stage2_leaves_a_policy_however_short_it_is(tmp_path, monkeypatch):
    _, _, summary = run(tmp_path, monkeypatch, "state", iterations=1)
    assert Path("runs/stage2/policy.safetensors").exists() and summary["eval_episodes"] == 3


def test_the_success_bonus_is_added_where_an_episode_truly_ended_in_success(tmp_path, monkeypatch):
    near = lambda env: np.linalg.norm(env.pos - env._goal(), axis=1) < 0.75  # noqa: E731 - some are met by chance
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "_success", near)
    rows = []
    for name, bonus in (("none", None), ("two", 2.0)):
        with monkeypatch.context() as m:
            (tmp_path / name).mkdir()
            run(
                tmp_path / name,
                m,
                "state",
                iterations=1,
                gamma=0.0,
                success="ground-truth",
                success_bonus=bonus,
            )
            rows.append(np.genfromtxt("runs/stage2/metrics.csv", delimiter=",", names=True))
    none, two = rows
    assert none["true_at_end"] > 0 and none["env_steps"] == two["env_steps"]  # the first practice is the same
    added = 2 * two["true_at_end"] / two["mean_steps"]
    assert two["return_mean"] - none["return_mean"] == pytest.approx(added, abs=1e-4)


def practised(tmp_path, monkeypatch, name: str, **settings) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """The first update's log p and R, and the row of metrics.csv, of one iteration."""
    seen, loss = [], stage2.reinforce_loss
    with monkeypatch.context() as m:
        m.setattr(
            stage2,
            "reinforce_loss",
            lambda log_prob, R, c: seen.append((log_prob.detach(), R)) or loss(log_prob, R, c),
        )
        (tmp_path / name).mkdir()
        run(tmp_path / name, m, "state", iterations=1, **settings)
        row = np.genfromtxt("runs/stage2/metrics.csv", delimiter=",", names=True)
    return *seen[0], row


def test_rewards_are_cut_off_where_clip_reward_says(tmp_path, monkeypatch):
    _, free, _ = practised(tmp_path, monkeypatch, "free", gamma=0.0)
    bound = free.abs().median().item()
    _, cut, _ = practised(tmp_path, monkeypatch, "cut", gamma=0.0, clip_reward=bound)
    assert free.abs().max() > bound > 0
    assert torch.equal(cut, free.clamp(-bound, bound))  # the first practice is the same


def test_the_temperature_is_the_policys_in_rollouts_and_updates_and_evaluation_has_the_domains(tmp_path, monkeypatch):
    log_prob, _, row = practised(tmp_path, monkeypatch, "one")
    assert row["entropy"] > 1 and log_prob.max() < -0.5
    evaluated, evaluate = [], stage2.evaluate
    monkeypatch.setattr(stage2, "evaluate", lambda *a, **k: evaluated.append(evaluate(*a, **k)) or evaluated[-1])
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "temperature", 0.75)
    log_prob, _, row = practised(tmp_path, monkeypatch, "cold", temperature=1e-5)
    assert row["entropy"] < 0.1 and log_prob.min() > -0.1  # it does what is most probable, and log p says so
    assert [e["temperature"] for e in evaluated] == [0.75]


def test_practice_takes_the_domains_settings_and_a_flag_goes_before(tmp_path, monkeypatch):
    """In config.json, what it was: the flag's value, else the domain's, else the usual one."""
    monkeypatch.setattr(
        envs.pointmass.PointmassVectorEnv,
        "stage2_defaults",
        {"state": {"iterations": 2, "gamma": 0.5, "batch": 16}},
    )
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "temperature", 0.75)  # of evaluation, not of practice
    run(tmp_path, monkeypatch, "state", iterations=None, batch=None, gamma=0.0)
    took = json.loads(Path("runs/stage2/config.json").read_text())
    assert [took[k] for k in ("iterations", "gamma", "batch", "success_threshold")] == [2, 0.0, 16, 3.0]
    assert all(took[k] == setup.USUAL[k] for k in ("clip_reward", "success_bonus", "learns", "temperature"))
    assert len(Path("runs/stage2/metrics.csv").read_text().splitlines()) == 3


def test_practice_turns_tuples_where_stage_1_did(tmp_path, monkeypatch):
    """On the pointmass from states; a flag goes before, and features of images cannot be turned."""
    monkeypatch.chdir(tmp_path)
    elements = []
    changed = envs.symmetries.PointmassSymmetries.__call__
    watch = lambda self, g, *rest: (elements.extend(g), changed(self, g, *rest))[1]  # noqa: E731
    monkeypatch.setattr(envs.symmetries.PointmassSymmetries, "__call__", watch)
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "horizon", 4)
    few = {"updates": 2, "batch": 16, "num_envs": 4, "iterations": 1, "first_look": 4, "eval_episodes": 1}
    of_stage1 = {"a": {"symmetries": True}, "b": {"symmetries": False}, "c": {"symmetries": True}, "d": {}}
    for name, flag, turns in (("a", None, True), ("b", None, False), ("c", False, False), ("d", None, False)):
        stage1_run(Path(name), "state")
        settings = json.loads(Path(name, "config.json").read_text()) | of_stage1[name]
        Path(name, "config.json").write_text(json.dumps(settings))
        elements.clear()
        stage2.main(stage2.Config(stage1=name, out=f"{name}2", symmetries=flag, **few))
        assert json.loads(Path(f"{name}2/config.json").read_text())["symmetries"] == turns
        assert (len(set(elements)) > 16) == turns and len(elements) == 32 * turns
    stage1_run(Path("images"), "images")
    with pytest.raises(UserError, match="--symmetries: of images"):
        stage2.main(stage2.Config(stage1="images", out="images2", symmetries=True, **few))
    assert not Path("images2").exists()


@pytest.mark.parametrize("domain", envs.DOMAINS)
def test_the_domains_settings_are_fields_of_stage2(domain):
    fields = {f.name: f.default for f in dataclasses.fields(stage2.Config)}
    env = envs.make_vec(domain, 1)
    unset = {k for k, v in fields.items() if v is None}
    assert env.stage2_defaults.keys() == env.stage1_defaults.keys()
    for obs in env.stage2_defaults:
        settings = setup.USUAL | {"success_threshold": env.success_threshold} | env.stage2_defaults[obs]
        # the others come from the Stage 1 run or from this machine
        assert settings.keys() == unset - {
            "stage1",
            "reward_run",
            "domain",
            "seed",
            "device",
            "threads",
            "out",
        }


def test_practice_in_another_domain(tmp_path, monkeypatch):
    """Stage 1 on the simulated table, practice on the "real" one: it practises, and is evaluated, there."""
    monkeypatch.chdir(tmp_path)
    stage1_run(Path("runs/tabletop-stage1-s0"), "state", "tabletop")
    (Path("runs/tabletop-stage1-s0") / "summary.json").write_text("{}")
    few = {"updates": 1, "batch": 8, "num_envs": 2, "iterations": 1, "first_look": 2, "eval_episodes": 2}
    looks, make_vec = [], envs.make_vec

    def watched(*args, **kwargs):
        env = make_vec(*args, **kwargs)
        env.horizon = 8
        looks.append((env.name, env.real, len(env.things)))
        return env

    monkeypatch.setattr(envs, "make_vec", watched)
    stage2.main(stage2.Config(domain="tabletop,look=real", **few))
    assert looks.count(("tabletop,look=real", 1.0, 4)) >= 2  # practice, evaluation
    assert len(looks) - looks.count(("tabletop,look=real", 1.0, 4)) == looks.count(("tabletop", 0.0, 4)) == 1  # compared
    summary = json.loads(Path("runs/tabletop,look=real-stage2-s0/summary.json").read_text())
    assert summary["domain"] == "tabletop,look=real"


def test_practice_in_a_domain_with_other_actions_is_refused(tmp_path, monkeypatch):
    """A tokenizer that knows every word, as PaliGemma's does, would not notice."""
    monkeypatch.chdir(tmp_path)
    stage1_run(Path("runs/stage1"), "state")
    monkeypatch.setattr(setup, "load_checkpoint", lambda path, *_: small("state", 0))
    with pytest.raises(UserError, match="--domain tabletop"):
        stage2.main(stage2.Config(stage1="runs/stage1", domain="tabletop", out="runs/stage2"))
    stage1_run(Path("runs/frames"), "images", "tabletop")
    with pytest.raises(UserError, match="--domain tabletop,history=1"):  # its second frame is another one
        stage2.main(stage2.Config(stage1="runs/frames", domain="tabletop,history=1", out="runs/stage2"))
    assert not Path("runs/stage2").exists()


def test_stage2_repeats_exactly(tmp_path, monkeypatch):
    weights = []
    for name in ("a", "b"):
        with monkeypatch.context() as m:
            (tmp_path / name).mkdir()
            weights.append(run(tmp_path / name, m, "state", iterations=3)[0][0].state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# --- practice without resets ------------------------------------------------------------------------------
def test_the_operator_resets_only_what_has_fallen_or_is_overdue():
    env = envs.make_vec("tabletop", 6)
    operator = Operator(env, 0)
    assert ((operator.due >= 1800) & (operator.due <= 3000)).all()  # 3-5 minutes at 10 Hz
    operator.reset(seed=0)
    assert operator.interventions == 0 and (operator.steps == 0).all()  # setting up is nobody's intervention
    for _ in range(5):
        env.step(env.expert())
    operator.steps += np.array([5, 5, 5, 2999, 1799, 5])  # 3 and 4: overdue or not, as the operator feels
    overdue = operator.steps > operator.due
    env.fallen[1, 2] = True
    before, texts = env.pos.copy(), list(env.texts)
    obs, info = operator.reset(seed=100)
    moved = (env.pos != before).any((1, 2))
    assert moved.tolist() == [False, True, False, bool(overdue[3]), False, False] and overdue[3] and not overdue[4]
    assert operator.interventions == 2 and operator.steps.tolist() == [5, 0, 5, 0, 1799, 5]
    assert not env.fallen.any() and not info["is_success"].any() and tuple(obs["instruction"]) == tuple(env.texts)
    assert sum(a != b for a, b in zip(texts, env.texts, strict=True)) >= 5  # new instructions, where nothing moved as well
    assert (env.t == 0).all()


def test_practice_without_resets_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = envs.make_vec
    monkeypatch.setattr(envs, "make_vec", lambda *a, **k: (e := make(*a, **k), setattr(e, "horizon", 8))[0])
    stage1_run(Path("runs/stage1"), "state", "tabletop")
    settings = {"stage1": "runs/stage1", "operator": True, "updates": 2, "batch": 16, "num_envs": 4, "first_look": 4}
    settings |= {"iterations": 4, "lr": 1e-3, "eval_episodes": 2}
    stage2.main(stage2.Config(out="runs/whole", **settings))
    rows = np.genfromtxt("runs/whole/metrics.csv", delimiter=",", names=True)
    np.testing.assert_allclose(rows["robot_hours"], rows["env_steps"] / 36_000, rtol=1e-5)
    assert (np.diff(rows["interventions"]) >= 0).all()

    class Killed(Exception):
        pass

    checkpoint, calls = runs.Run.checkpoint, []

    def dies(self):
        checkpoint(self)
        calls.append(self)
        if len(calls) == 2:
            raise Killed

    monkeypatch.setattr(runs.Run, "checkpoint", dies)
    with pytest.raises(Killed):
        stage2.main(stage2.Config(out="runs/cut", **settings))
    monkeypatch.setattr(runs.Run, "checkpoint", checkpoint)
    stage2.main(stage2.Config(out="runs/cut", resume=True, **settings))
    again = np.genfromtxt("runs/cut/metrics.csv", delimiter=",", names=True)
    for name in set(rows.dtype.names) - {"seconds"}:
        np.testing.assert_array_equal(rows[name], again[name])
    whole, cut = (safetensors.torch.load_file(f"runs/{name}/policy.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_domain_that_needs_resets_refuses_the_operator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage1_run(Path("runs/stage1"), "state")
    with pytest.raises(UserError, match="--operator: pointmass"):
        stage2.main(stage2.Config(stage1="runs/stage1", operator=True))
