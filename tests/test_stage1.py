"""Stage 1: every objective can be learnt, and what a run keeps."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import stage1
from common import UserError, demos, ranks, setup
from common.demos import Demonstrations, load_demonstrations, split
from common.runs import Run, load_state
from common.weights import load_model
from envs.pointmass import PointmassVectorEnv
from model import EFM, PRESETS, EFMConfig
from tests.conftest import EPISODES, one_view
from tokens import QUESTION_INSTRUCTION, StepsToGo, Tokenizer, action_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty folder, and runs that end without an evaluation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage1, "evaluate", lambda *_, **__: {})


def test_losses_are_those_of_the_two_questions(states):
    env, model = envs.make_vec("pointmass", 1), small("state")
    actions, steps = action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    demos = Demonstrations(states, np.arange(EPISODES), 2)
    obs, action, goals, to_go = demos.batch(np.array([0, 5, 60]), CPU)
    asked = [
        (stage1.bc_loss, "What robot action to {}", actions.encode(action), actions.ranges),
        (stage1.steps_to_go_loss, "How many steps to {}", steps.encode(to_go), steps.ranges),
    ]
    with torch.no_grad():
        for loss, question, tokens, ranges in asked:
            log_probs = model.log_probs(obs, [question.format(g) for g in goals], tokens, ranges)
            expected = -sum(lp[torch.arange(3), tokens[:, i]] for i, lp in enumerate(log_probs)).mean()
            got = loss(model, obs, goals, tokens, ranges)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def small(obs: str, *texts: str) -> EFM:
    env = envs.make_vec("pointmass", 1, obs=obs)
    sizes = {"image_size": env.size}
    if obs == "state":
        sizes = {"state_names": env.state_names, "state_dim": env.state_dim}
    cfg = EFMConfig(width=48, depth=2, heads=4, kv_heads=2, head_dim=12, mlp_dim=96, patch_size=8,
                    vit_width=48, vit_depth=1, vit_heads=4, vit_mlp_dim=96, **sizes)  # fmt: skip
    torch.manual_seed(0)
    return EFM(cfg, Tokenizer.train([*env.instructions(), *env.state_names, *texts]))


def test_overfits_a_batch(recorded):
    obs_mode, data = recorded
    env, model = envs.make_vec("pointmass", 1, obs=obs_mode), small(obs_mode)
    actions, steps = action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    demos = Demonstrations(data, np.arange(EPISODES), 2)
    rows = np.random.default_rng(0).choice(demos.acted, 16, replace=False)
    obs, action, goals, to_go = demos.batch(rows, CPU)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        bc = stage1.bc_loss(model, obs, goals, actions.encode(action), actions.ranges)
        distance = stage1.steps_to_go_loss(model, obs, goals, steps.encode(to_go), steps.ranges)
        optimizer.zero_grad()
        (bc + distance).backward()
        optimizer.step()
        losses.append((bc.item(), distance.item()))
    assert losses[0][0] > 4 and losses[0][1] > 3  # about log 21² and log 140 to begin with
    assert losses[-1][0] < 0.2 and losses[-1][1] < 0.2
    prompts = ["What robot action to " + g for g in goals]
    assert torch.equal(model.sample(obs, prompts, actions.ranges, greedy=True)[0], actions.encode(action))
    assert (model.steps_to_go(obs, goals, steps) - to_go).abs().max() < 15


def test_instructions_can_be_predicted_from_first_and_last_observations(recorded):
    obs_mode, data = recorded[0], one_view(recorded[1])
    model, demos = small(obs_mode, QUESTION_INSTRUCTION), Demonstrations(data, np.arange(EPISODES), 2)
    obs, goals = demos.first_and_last(np.arange(EPISODES), CPU)
    assert len(set(goals)) > 5
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        loss = stage1.instruction_loss(model, obs, goals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 20 and losses[-1] < 0.2  # six tokens of a vocabulary of a thousand to begin with
    prompts = ["What instruction was performed"] * EPISODES
    loss = stage1.instruction_loss(model, obs, goals)
    torch.testing.assert_close(loss, -model.text_log_prob(obs, prompts, goals).mean())
    assert model.generate_text(obs, prompts) == goals


def test_a_state_mlp_is_told_the_demonstrations_mean_and_spread(quick, monkeypatch):
    sizes = dict(width=32, depth=1, mlp_dim=32, state_mlp=8, state_bias_tokens=2)
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], **sizes))
    cfg = stage1.Config(episodes=20, updates=2, eval_every=2, eval_episodes=2, out="run")
    stage1.main(cfg)
    data = load_demonstrations(dataclasses.replace(cfg, obs="state"))
    held_out, _ = split(20, 1.0)
    spans = zip(data["start"][~held_out], data["length"][~held_out], strict=True)
    states = np.concatenate([data["state"][first : first + n] for first, n in spans])
    model = load_model(Path("run/policy.safetensors"))
    np.testing.assert_allclose(model.state_mean, states.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.state_scale, states.std(0, ddof=1) + 1e-2, rtol=1e-4)


def test_a_domain_that_predicts_instructions_has_a_third_objective(quick, monkeypatch):
    monkeypatch.setattr(PointmassVectorEnv, "predicts_instruction", True)
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], width=32, depth=1, mlp_dim=32))
    asked = []

    def counted(name: str) -> Callable:
        loss = getattr(stage1, name)

        def call(model: EFM, obs: dict, goals: list[str], *rest) -> torch.Tensor:
            asked.append((name, len(goals)))
            return loss(model, obs, goals, *rest)

        return call

    for name in ("bc_loss", "steps_to_go_loss", "instruction_loss"):
        monkeypatch.setattr(stage1, name, counted(name))
    cfg = stage1.Config(episodes=20, updates=20, eval_every=10, eval_episodes=2, out="run")
    stage1.main(cfg)
    assert asked[:3] == [("bc_loss", 43), ("steps_to_go_loss", 43), ("instruction_loss", 42)]
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    assert rows.dtype.names == ("update", "bc", "steps_to_go", "instruction",
                                "valid_bc", "valid_steps_to_go", "valid_error", "valid_instruction", "seconds")  # fmt: skip
    assert rows["valid_instruction"][1] < rows["valid_instruction"][0] < 60
    tokenizer = load_model(Path("run/policy.safetensors")).tokenizer.tokenizer
    assert "<unk>" not in tokenizer.encode(QUESTION_INSTRUCTION, add_special_tokens=False).tokens
    with pytest.raises(UserError, match="--batch 2"):
        stage1.main(dataclasses.replace(cfg, batch=2, out="other"))


def test_the_third_objective_ends_when_the_held_out_answers_get_worse(quick, monkeypatch):
    monkeypatch.setattr(PointmassVectorEnv, "predicts_instruction", True)
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], width=32, depth=1, mlp_dim=32))
    # nine episodes are soon learnt by heart
    plain = {"symmetries": False, "average": 0.0}
    cfg = stage1.Config(episodes=11, updates=120, eval_every=10, lr=1e-2, out="run", **plain)
    stage1.main(cfg)
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    worse = np.flatnonzero(np.diff(rows["valid_instruction"]) >= 0)
    assert len(worse) and worse[0] + 2 < len(rows)
    asked = np.isfinite(rows["instruction"])
    assert asked[: worse[0] + 2].all() and not asked[worse[0] + 2 :].any()
    assert np.isfinite(rows["valid_instruction"]).all()

    class Killed(Exception):
        pass

    cut = dataclasses.replace(cfg, out="cut")
    log, looks = Run.log, []

    def log_or_die(self, *args):
        if len(looks) > worse[0] + 2:
            raise Killed
        looks.append(log(self, *args))

    monkeypatch.setattr(Run, "log", log_or_die)
    with pytest.raises(Killed):
        stage1.main(cut)
    monkeypatch.setattr(Run, "log", log)
    stage1.main(dataclasses.replace(cut, resume=True))
    again = np.genfromtxt("cut/metrics.csv", delimiter=",", names=True)
    for name in rows.dtype.names[:-1]:  # all but the seconds
        np.testing.assert_array_equal(rows[name], again[name])


def test_a_run_on_two_sides_learns_what_one_does_and_resumes_exactly(quick, monkeypatch):
    monkeypatch.setattr(PointmassVectorEnv, "predicts_instruction", True)
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], width=32, depth=1, mlp_dim=32))
    monkeypatch.setattr(ranks, "sides", 1)  # put back at the end
    cfg = stage1.Config(episodes=20, updates=9, eval_every=3, eval_episodes=4, lr=1e-3)
    threads, checkpoint = torch.get_num_threads(), Run.checkpoint

    def killed(run: Run) -> None:
        checkpoint(run)
        raise KeyboardInterrupt

    stage1.main(dataclasses.replace(cfg, threads=1, out="one"))
    assert ranks.sides == 1
    stage1.main(dataclasses.replace(cfg, threads=2, out="two"))
    assert ranks.sides == 2 and torch.get_num_threads() == 1
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "checkpoint", killed)
        stage1.main(dataclasses.replace(cfg, threads=2, out="cut"))
    stage1.main(dataclasses.replace(cfg, threads=2, out="cut", resume=True))
    torch.set_num_threads(threads)
    one, two, cut = (load_model(Path(name) / "policy.safetensors").state_dict() for name in ("one", "two", "cut"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-5, atol=1e-5)
        assert torch.equal(cut[key], two[key]), key
    without_seconds = [
        [line.rsplit(",", 1)[0] for line in (Path(name) / "metrics.csv").read_text().splitlines()] for name in ("two", "cut")
    ]
    assert without_seconds[0] == without_seconds[1] and len(without_seconds[0]) == 4


def test_a_fraction_without_episodes_to_hold_out_is_refused(quick, monkeypatch):
    with pytest.raises(UserError, match="--data-fraction 0.05.*--episodes"):
        stage1.main(stage1.Config(episodes=12, data_fraction=0.05, updates=1, out="run"))
    assert not Path("run").exists()


def test_a_short_run_writes_what_stage2_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(PRESETS["nano"], width=32, depth=1, heads=2, kv_heads=1, mlp_dim=32)
    monkeypatch.setitem(PRESETS, "nano", tiny)
    few = {"episodes": 20, "updates": 20, "batch": 16, "eval_every": 10, "eval_episodes": 2}
    cfg = stage1.Config(domain="pointmass", obs="state", seed=0, **few, out="run")
    stage1.main(cfg)
    for name in ("config.json", "policy.safetensors", "reward.safetensors", "summary.json"):
        assert (Path("run") / name).stat().st_size > 0
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    names = ("update", "bc", "steps_to_go", "valid_bc", "valid_steps_to_go", "valid_error", "seconds")
    assert rows.dtype.names == names
    assert rows["update"].tolist() == [10, 20] and rows["valid_bc"][1] < rows["valid_bc"][0]
    assert load_model(Path("run/policy.safetensors")).cfg.width == 32
    with pytest.raises(UserError, match="run"):
        stage1.main(cfg)  # it exists: nothing is overwritten


def test_the_last_policy_is_kept_beside_the_best_where_the_domain_takes_it(quick, monkeypatch):
    # it gets worse at the end
    monkeypatch.setattr(setup, "learning_rate", lambda update, *_: 1e-2 if update < 8 else 1.0)
    tiny = dataclasses.replace(PRESETS["nano"], width=32, depth=1, heads=2, kv_heads=1, mlp_dim=32)
    monkeypatch.setitem(PRESETS, "nano", tiny)
    cfg = stage1.Config(episodes=20, updates=12, batch=16, eval_every=2, eval_episodes=2, average=0.0)
    for name in ("best", "last"):
        stage1.main(dataclasses.replace(cfg, policy=name, out=name))
    held = np.genfromtxt("last/metrics.csv", delimiter=",", names=True)["valid_bc"]
    assert held[-1] > held.min()
    kept = ("best/policy", "last/early_policy", "last/policy")
    best, early, last = (load_model(Path(f"{name}.safetensors")).state_dict() for name in kept)
    final = load_state(Path("last/resume.pt"))["model"]
    assert not Path("best/early_policy.safetensors").exists()
    assert all(torch.equal(best[k], early[k]) and torch.equal(last[k], final[k]) for k in best)
    assert any(not torch.equal(early[k], last[k]) for k in best)
    for name, weights in (("early_policy", early), ("policy", last)):  # eval.py --policy
        acts = setup.load_run(Path("last"), 1, name)[1].state_dict()
        assert all(torch.equal(acts[k], weights[k]) for k in weights)


def test_the_error_of_d_is_relative():
    model = types.SimpleNamespace(steps_to_go=lambda *_: torch.tensor([0.0, 3.0, 9.0, 49.0]))
    left = torch.tensor([0, 1, 19, 500])
    error = demos.relative_error(model, {}, ["a", "b", "c", "d"], left, StepsToGo(100, 100))
    # |log(1 / 1)|, |log(4 / 2)|, |log(10 / 20)|, |log(50 / 100)|: d says 99 at most
    assert error.item() == pytest.approx(3 * np.log(2) / 4)


@pytest.mark.parametrize(("chosen_by", "at"), [("loss", 4), ("error", 6)])
def test_the_reward_model_is_least_in_loss_or_in_error(quick, monkeypatch, chosen_by, at):
    """The loss is least after four updates, the error after six of eight."""
    loss, losses, errors = stage1.steps_to_go_loss, iter([3.0, 2.0, 4.0, 5.0]), iter([0.9, 0.8, 0.3, 0.5])

    def held_out_loss(*args):
        return loss(*args) if torch.is_grad_enabled() else torch.tensor(next(losses))

    monkeypatch.setattr(stage1, "steps_to_go_loss", held_out_loss)
    monkeypatch.setattr(demos, "relative_error", lambda *_: torch.tensor(next(errors)))
    keep, kept = Run.keep, []

    def noted(run, **models):
        kept.extend((name, run.tracked["progress"].update) for name in models)
        keep(run, **models)

    monkeypatch.setattr(Run, "keep", noted)
    flags = {"episodes": 20, "updates": 8, "batch": 16, "eval_every": 2, "eval_episodes": 2}
    stage1.main(stage1.Config(**flags, reward=chosen_by, out="run"))
    assert [update for name, update in kept if name == "reward"][-1] == at
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    np.testing.assert_allclose(rows["valid_error"], [0.9, 0.8, 0.3, 0.5], rtol=1e-5)


def test_the_average_of_the_weights_is_what_is_kept(quick):
    cfg = stage1.Config(episodes=20, updates=6, batch=16, eval_every=6, eval_episodes=2, policy="last", out="run")
    stage1.main(cfg)
    state, kept = load_state(Path("run/resume.pt")), load_model(Path("run/policy.safetensors")).state_dict()
    assert json.loads(Path("run/config.json").read_text())["average"] == 0.998
    assert state["average"]["updates"] == 6
    named = [k for k in kept if k in state["average"]]
    assert len(named) > 10
    assert all(torch.equal(kept[k], state["average"][k]) for k in named)
    assert any(not torch.equal(kept[k], state["model"][k]) for k in named)


def test_the_threshold_is_measured_and_handed_on(quick):
    stage1.main(stage1.Config(episodes=20, updates=6, batch=16, eval_every=6, eval_episodes=2, out="run"))
    summary = json.loads(Path("run/summary.json").read_text())
    env, _, reward_model = setup.load_run(Path("run"), 1)
    cfg = types.SimpleNamespace(**json.loads(Path("run/config.json").read_text()))
    _, valid = demos.load(cfg, env)
    steps = StepsToGo(env.steps_cap, env.steps_bins)
    before, final = demos.arrivals(reward_model, valid, steps, 300)
    assert len(before) == len(final) == 2
    for episode in range(2):  # by hand, one observation after another
        rows = np.flatnonzero(valid.episode == episode)
        obs, _, goals, left = valid.batch(rows, torch.device("cpu"))
        with torch.no_grad():
            d = reward_model.steps_to_go(obs, goals, steps)
        torch.testing.assert_close(final[episode], d[left == 0][0])
        torch.testing.assert_close(before[episode], d[left > 0].min())
    assert summary["success_threshold"] == pytest.approx(stage1.calibrate(before, final)[0])
    assert setup.measured_threshold(Path("run"), env) == summary["success_threshold"] != env.success_threshold
    assert setup.measured_threshold(Path("nowhere"), env) == env.success_threshold


def test_symmetries_are_for_those_who_have_seen_nothing_else(quick):
    env = envs.make_vec("pointmass", 1)
    for flag, order in ((None, 48), (True, 48), (False, 1)):
        cfg = stage1.Config(episodes=20, updates=1, batch=8, symmetries=flag, turns=False, out=f"run-{flag}")
        setup.stage1(cfg)
        train, valid = demos.load(cfg, env)
        assert train.symmetries.order == order and valid.symmetries.order == 1
        drawn = train.draw(np.arange(500) % len(train.index), np.random.default_rng(0))
        assert drawn[:, 1].max() == order - 1 and drawn[:, 1].min() == 0


def test_a_run_that_diverges_says_so(quick, monkeypatch):
    with pytest.raises(UserError, match="--lr 1000000"):
        stage1.main(stage1.Config(episodes=20, updates=4, batch=8, eval_every=2, lr=1e6, out="run"))


# --- from an earlier run --------------------------------------------------------------------------------
def still(out: str, **settings) -> EFM:
    """The policy of one update with a learning rate of nearly nothing: the model that the run started from."""
    few = {"episodes": 20, "updates": 1, "batch": 8, "lr": 1e-9, "eval_every": 1, "eval_episodes": 2}
    stage1.main(stage1.Config(**few | settings, out=out))
    return load_model(Path(out) / "policy.safetensors")


def test_stage1_goes_on_from_an_earlier_stage1_from_states(quick, monkeypatch, capsys):
    """Its weights, and what it knows of mean and spread: other demonstrations do not change the function."""
    sizes = {"width": 32, "depth": 1, "mlp_dim": 32, "state_mlp": 8, "state_bias_tokens": 2}
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], **sizes))
    first = still("runs/first", updates=10, lr=1e-2).state_dict()
    capsys.readouterr()
    second = still("runs/second", init="runs/first", seed=1).state_dict()
    assert "starting from runs/first" in capsys.readouterr().out
    third = still("runs/third", seed=1).state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=0)
        assert not torch.allclose(third[name], value, atol=1e-6), name
    assert json.loads(Path("runs/second/config.json").read_text())["init"] == "runs/first"


def test_a_model_with_a_state_mlp_can_read_images_instead(quick, monkeypatch):
    sizes = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 16}
    small = sizes | {"vit_width": 16, "vit_heads": 2, "vit_mlp_dim": 16}
    monkeypatch.setitem(PRESETS, "nano-arms", dataclasses.replace(PRESETS["nano-arms"], **small))
    assert PRESETS["nano-arms"].state_mlp
    assert still("run", model="nano-arms", obs="images", init="none").cfg.image_size
