"""iRe-VLA: its equations by hand, what each phase may change, and an exact resume."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import stage1
from baselines import irevla, plumbing
from common import UserError
from common.runs import Run, read_json
from common.weights import load_model
from envs import make_vec
from envs.pointmass import PointmassVectorEnv
from rollout import encode_observation, rollout
from tests import tiny
from tokens import QUESTION_ACTION, action_tokenizer


@pytest.fixture
def policy():
    return irevla.with_action_head(tiny.small("state", 0))


@pytest.fixture
def watched():
    """An input, prompts and answers of eight pointmasses."""
    env = make_vec("pointmass", 8, obs="state")
    obs, _ = env.reset(seed=0)
    model = tiny.small("state", 0)
    prompts = [QUESTION_ACTION.format(text) for text in obs["instruction"]]
    ranges = action_tokenizer(**env.action_tokens).ranges
    tokens = torch.randint(0, 21, (8, 2), generator=torch.Generator().manual_seed(1))
    return encode_observation(model, obs, np.arange(8)), prompts, tokens, ranges


def test_gae_by_hand():
    reward = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    value = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.5, 0.0]])
    got = irevla.gae(reward, value, np.array([3, 2]), gamma=0.5, lam=0.5)
    last = 1 - 0.75  # success is terminal: no value behind it
    middle = 0.5 * 0.75 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.5 + 0.25 * middle
    # the second episode ends after two steps without success: terminal as well
    assert got.tolist() == [pytest.approx([first, middle, last]), pytest.approx([0.25 - 0.5 - 0.25 * 0.5, -0.5, 0.0])]


def test_gae_with_lambda_one_is_the_return_less_the_value():
    value = torch.rand(1, 4)
    got = irevla.gae(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), value, np.array([4]), 0.9, 1.0)
    assert torch.allclose(got[0], torch.tensor([0.9**3, 0.9**2, 0.9, 1.0]) - value[0], atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [(1.5, 1.0, -1.2, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True), (0.5, -1.0, 0.8, False), (1.1, 2.0, -2.2, True)],
)
def test_clipping_by_hand(ratio, advantage, loss, moves):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    got = irevla.ppo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss) and bool(log_prob.grad.abs() > 0) == moves


def test_a_new_action_head_changes_nothing(watched, policy):
    obs, prompts, tokens, ranges = watched
    plain = tiny.small("state", 0)
    assert torch.equal(plain.log_prob(obs, prompts, tokens, ranges), policy.log_prob(obs, prompts, tokens, ranges))
    draws = [m.sample(obs, prompts, ranges, torch.Generator().manual_seed(3))[0] for m in (plain, policy)]
    assert torch.equal(*draws)


def test_log_p_from_hidden_states_is_the_policys(watched, policy):
    obs, prompts, tokens, ranges = watched
    torch.nn.init.normal_(policy.action_head[2].weight)  # it counts
    hidden = policy.hidden(obs, prompts, tokens + policy.tokenizer.loc)
    got = irevla.action_log_prob(policy, hidden, tokens, ranges)
    assert torch.allclose(got, policy.log_prob(obs, prompts, tokens, ranges), atol=1e-5)


def test_ppo_finds_the_rewarded_token(watched, policy):
    """Only the head learns, and it learns which number is paid."""
    obs, prompts, _, ranges = watched
    optimizer = torch.optim.AdamW(irevla.learners(policy, "head"), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def paid() -> float:
        return policy.log_probs(obs, prompts, torch.zeros(8, 2, dtype=torch.long), ranges)[0].exp()[:, 7].mean().item()

    before = paid()
    for _ in range(40):
        tokens, _ = policy.sample(obs, prompts, ranges, generator)
        with torch.no_grad():
            hidden = policy.hidden(obs, prompts, tokens + policy.tokenizer.loc)
            old = irevla.action_log_prob(policy, hidden, tokens, ranges)
        reward = (tokens[:, 0] == 7).float() - (tokens[:, 0] - 7).abs() / 20
        advantage = (reward - reward.mean()) / reward.std().clamp(min=0.05)
        for _ in range(4):
            loss = irevla.ppo_loss(irevla.action_log_prob(policy, hidden, tokens, ranges), old, advantage, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert before < 0.15 and paid() > 2 * before


# --- what the episodes become -----------------------------------------------------------------------------------------
SHORT = {"num_envs": 3, "tuples": 10, "minibatch": 8, "seed": 0, "epochs": 2, "lr": 1e-2}


def second_ends_after_four():
    """What ends the second of three simulations after four steps, and no other."""
    calls = iter(range(99))

    def ends(d: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.tensor([False, next(calls) == 3, False])[: len(truth)]

    return ends


@pytest.fixture(scope="module")
def two_rollouts():
    """Two rounds of three episodes of at most 12 steps, and the untrained policy that acted; some are said to succeed."""
    policy, rounds = irevla.with_action_head(tiny.small("state", 0)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PointmassVectorEnv, "horizon", 12)
        env = make_vec("pointmass", 3, obs="state")
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            r = rollout(policy, None, env, seed, generator, second_ends_after_four())
            r.truth[:, -1] = torch.tensor([True, False, seed == 1])
            rounds.append(r)
    assert [r.length.tolist() for r in rounds] == [[12, 4, 12]] * 2
    return policy, rounds


def test_tuples_by_hand(two_rollouts):
    """Rewards, values and advantages of each episode, one after another."""
    policy, rounds = two_rollouts
    critic, cfg = critic_that_speaks(policy), irevla.Config(**SHORT)
    data = irevla.Tuples(policy, critic, rounds, cfg, RANGES)
    at = 0
    for r in rounds:
        for i in range(3):
            mine = torch.arange(len(r.row))[r.row == i] + at  # in order of time
            with torch.no_grad():
                prompts = [QUESTION_ACTION.format(goal) for goal in r.goals[(r.row == i).numpy()]]
                state = {"state": r.obs["state"][r.row == i]}
                hidden = policy.hidden(state, prompts, r.tokens[r.row == i] + policy.tokenizer.loc)
                value = critic(hidden)
            assert len(value) == r.length[i] and torch.allclose(data.kept[mine], hidden, atol=1e-5)
            reward = torch.zeros(1, len(value))
            reward[0, -1] = float(r.truth[i, -1])
            want = irevla.gae(reward, value[None], r.length[i : i + 1], cfg.gamma, cfg.gae_lambda)[0]
            assert torch.allclose(data.advantage[mine], want, atol=1e-5)
            assert torch.allclose(data.returns[mine], want + value, atol=1e-5)
        at += len(r.row)
    assert data.successes == 3 and at == len(data.tokens)


RANGES = action_tokenizer(**make_vec("pointmass", 1, obs="state").action_tokens).ranges


def critic_that_speaks(policy) -> irevla.Critic:
    torch.manual_seed(5)
    return irevla.Critic(policy.cfg.width)  # not renewed: it does not say 0


def test_a_renewed_critic_says_zero_and_has_forgotten(policy):
    critic = critic_that_speaks(policy)
    hidden = torch.randn(4, 2, policy.cfg.width)
    assert (critic(hidden) != 0).all()
    first = critic.layers[0].weight.clone()
    critic.renew(3)
    assert (critic(hidden) == 0).all() and not torch.equal(first, critic.layers[0].weight)


@pytest.mark.parametrize("explores", ["head", "all"])
def test_the_ratio_is_one_before_the_first_step(two_rollouts, explores, monkeypatch):
    """Then PPO's loss is minus the mean standardised advantage, 0, and KL is 0; after a step it is not."""
    policy, rounds = two_rollouts
    policy, seen, loss = copy_of(policy), [], irevla.ppo_loss
    monkeypatch.setattr(
        irevla, "ppo_loss", lambda now, before, *rest: (seen.append((now - before).detach()), loss(now, before, *rest))[1]
    )
    cfg = irevla.Config(**SHORT, explores=explores, max_kl=100)
    critic = critic_that_speaks(policy)
    data = irevla.Tuples(policy, critic, rounds, cfg, RANGES)
    optimizer = torch.optim.AdamW(irevla.learners(policy, explores), lr=cfg.lr, weight_decay=0)
    told = irevla.ppo(data, optimizer, cfg, torch.Generator().manual_seed(0), critic_alone=False)
    assert seen[0].abs().max() < 1e-4 and seen[-1].abs().max() > 1e-2
    assert told["updates"] == len(seen) == 2 * -(-len(data.tokens) // cfg.minibatch) and told["kl"] > 0


def copy_of(policy):
    other = irevla.with_action_head(tiny.small("state", 0))
    other.load_state_dict(policy.state_dict())
    return other


@pytest.mark.parametrize("explores", ["head", "all"])
def test_a_critic_that_warms_up_leaves_the_policy_alone(two_rollouts, explores):
    policy = copy_of(two_rollouts[0])
    cfg, critic = irevla.Config(**SHORT, explores=explores), critic_that_speaks(policy)
    data = irevla.Tuples(policy, critic, two_rollouts[1], cfg, RANGES)
    groups = [{"params": irevla.learners(policy, explores)}, {"params": critic.parameters()}]
    before, value = {k: v.clone() for k, v in policy.state_dict().items()}, critic(data.kept).detach()
    told = irevla.ppo(data, torch.optim.AdamW(groups, lr=1e-2), cfg, torch.Generator(), critic_alone=True)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    error = [(v - data.returns).square().mean() for v in (value, critic(data.kept).detach())]
    assert error[1] < error[0] and told["updates"] > 0 and told["kl"] == 0


def test_the_epochs_end_where_the_policy_has_gone_too_far(two_rollouts):
    policy = copy_of(two_rollouts[0])
    cfg = irevla.Config(**SHORT | {"lr": 1.0, "epochs": 9}, max_kl=0.03)
    data = irevla.Tuples(policy, critic_that_speaks(policy), two_rollouts[1], cfg, RANGES)
    optimizer = torch.optim.AdamW(irevla.learners(policy, "head"), lr=cfg.lr)
    told = irevla.ppo(data, optimizer, cfg, torch.Generator().manual_seed(0), critic_alone=False)
    assert told["updates"] == 1 and told["kl"] > 0.03  # the step that went too far was the first and the last


def test_successes_alone_are_kept(two_rollouts):
    _, rounds = two_rollouts
    found = irevla.Successes()
    found.add(rounds)
    (task,) = found.tasks
    kept = [torch.isin(r.row, r.truth[:, -1].nonzero()[:, 0]) for r in rounds]
    assert torch.equal(task["tokens"], torch.cat([r.tokens[i] for r, i in zip(rounds, kept, strict=True)]))
    assert torch.equal(task["state"], torch.cat([r.obs["state"][i] for r, i in zip(rounds, kept, strict=True)]))
    assert len(task["goals"]) == 12 + 24 and task["goals"][0] == rounds[0].goals[0]
    failed = [dataclasses.replace(r, truth=torch.zeros_like(r.truth)) for r in rounds]
    found.add(failed)
    assert len(found.tasks) == 1


def test_a_batch_has_as_much_of_each_task():
    tasks = [{"state": torch.full((n, 1, 4), float(n)), "tokens": torch.full((n, 2), n), "goals": [str(n)] * n} for n in (3, 50)]
    obs, goals, tokens = irevla.Successes(tasks).batch(11, np.random.default_rng(0))
    assert goals.count("3") == 6 and goals.count("50") == 5
    assert obs["state"][:, 0, 0].tolist() == tokens[:, 0].tolist() == [float(goal) for goal in goals]


def test_half_of_a_batch_are_demonstrations(two_rollouts, states):
    from common.demos import Demonstrations

    policy, rounds = two_rollouts
    actions = action_tokenizer(**make_vec("pointmass", 1, obs="state").action_tokens)
    demos = Demonstrations(states, np.arange(6), make_vec("pointmass", 1, obs="state").state_dim)
    asked = []
    loss = stage1.bc_loss

    def counted(model, obs, goals, tokens, ranges):
        asked.append(len(tokens))
        return loss(model, obs, goals, tokens, ranges)

    found, cfg = irevla.Successes(), irevla.Config(sl_batch=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(irevla, "bc_loss", counted)
        alone = irevla.sl_losses(policy, demos, found, cfg, np.random.default_rng(0), actions)
        found.add(rounds)
        both = irevla.sl_losses(policy, demos, found, cfg, np.random.default_rng(0), actions)
    assert len(alone) == 1 and len(both) == 2 and asked == [10, 5, 5]


# --- whole runs -------------------------------------------------------------------------------------------------------
SETTINGS = {"stage1": "runs/one", "tasks": ("pointmass", "pointmass"), "env_steps": 80, "num_envs": 4, "tuples": 40,
            "minibatch": 20, "warmup": 1, "least_successes": 0, "collect_steps": 30, "successes": 2, "sl_updates": 5,
            "sl_batch": 4, "eval_episodes": 2}  # fmt: skip


@pytest.fixture(scope="module")
def imitated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("irevla")

    def renew(self: irevla.Critic, seed: int) -> None:
        """Says anything, and not 0: these untrained policies never succeed, and without a surprise nothing is learnt."""
        torch.manual_seed(seed)
        self.layers[0].reset_parameters()
        self.layers[2].reset_parameters()

    with pytest.MonkeyPatch.context() as patch, tiny.tiny_presets():
        patch.setattr(irevla.Critic, "renew", renew)
        patch.setattr(irevla, "LOOK", 2)
        patch.setattr(PointmassVectorEnv, "horizon", 12)
        patch.chdir(folder)
        stage1.main(stage1.Config(episodes=20, updates=2, batch=8, eval_every=2, eval_episodes=2, out="runs/one"))
        irevla.main(irevla.Config(**SETTINGS, out="runs/whole"))
        patch.setattr(plumbing, "evaluate", lambda *_: {})  # once is enough
        yield folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize(("explores", "consolidates"), [("head", "all"), ("all", "all"), ("head", "head")])
def test_each_phase_changes_what_it_may(imitated, monkeypatch, explores, consolidates):
    monkeypatch.chdir(imitated)
    folder = imitated / f"runs/{explores}-{consolidates}"
    if (explores, consolidates) == ("head", "all"):
        folder = imitated / "runs/whole"
    else:
        irevla.main(irevla.Config(**SETTINGS, explores=explores, consolidates=consolidates, out=str(folder)))
    after_rl, after_sl, after_second = (
        load_model(folder / f"{n}.safetensors").state_dict() for n in ("task1_rl", "task1_sl", "task2_rl")
    )
    original = load_model(imitated / "runs/one/policy.safetensors").state_dict()

    def moved(a: dict, b: dict) -> set[str]:
        """Which of head and backbone differ."""
        return {"head" if k.startswith("action_head") else "backbone" for k in a if k in b and not torch.equal(a[k], b[k])}

    assert ("backbone" in moved(original, after_rl)) == (explores == "all")
    assert any(v.abs().sum() > 0 for k, v in after_rl.items() if k.startswith("action_head.2"))  # it was 0
    assert "head" in moved(after_rl, after_sl)
    assert ("backbone" in moved(after_rl, after_sl)) == (consolidates == "all")
    assert ("backbone" in moved(after_sl, after_second)) == (explores == "all")


def test_what_a_run_logs(imitated):
    told = rows(imitated / "runs/whole")
    practice = [row for row in told if row["sl_update"] == "nan"]
    cloning = [row for row in told if row["sl_update"] != "nan"]
    assert [row["row"] for row in told] == [str(i + 1) for i in range(len(told))]
    assert {row["task"] for row in practice} == {row["task"] for row in cloning} == {"1", "2"}
    assert [row["sl_update"] for row in cloning] == ["2", "4"] * 2
    assert all(row["nll_demonstrations"] != "nan" and row["kl"] == "nan" for row in cloning)
    assert all(row["detected"] == "0" and row["explained_variance"] != "nan" for row in practice)
    # the first iteration of each task trains the critic alone
    for task in "12":
        first, second = [row for row in practice if row["task"] == task][:2]
        assert float(first["kl"]) == 0 < float(second["kl"])
    # all steps are counted: PPO's, 80 or a few more a task, and the collection's
    summary = read_json(imitated / "runs/whole/summary.json")
    assert 0.9 <= summary["env_steps"] / (summary["episodes"] * 12) <= 1  # hardly any succeeds
    assert 2 * (80 + 30) <= summary["env_steps"] <= 2 * (80 + 30 + 2 * 48)
    config = read_json(imitated / "runs/whole/config.json")
    assert (config["domain"], config["epochs"], config["lr"], config["gamma"]) == ("pointmass", 4, 3e-4, 0.99)


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_an_interrupted_run_ends_in_the_same_bytes(imitated, monkeypatch, n):
    """Stopped after the n-th checkpoint: in PPO, after the collection, in cloning, between tasks."""
    monkeypatch.chdir(imitated)
    calls, checkpoint, phases = [], Run.checkpoint, []

    def stop(self):
        checkpoint(self)
        calls.append(0)
        phases.append(self.tracked["progress"].phase)
        if len(calls) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "checkpoint", stop)
        irevla.main(irevla.Config(**SETTINGS, out=f"runs/cut{n}"))
    assert phases[-1] == {1: "rl", 3: "sl", 4: "sl", 6: "new"}[n]
    irevla.main(irevla.Config(**SETTINGS, out=f"runs/cut{n}", resume=True))
    assert tiny.metrics(imitated / f"runs/cut{n}") == tiny.metrics(imitated / "runs/whole")
    for name in ("task1_rl", "task1_sl", "task2_sl", "policy"):
        whole, cut = (imitated / f"runs/{run}/{name}.safetensors" for run in ("whole", f"cut{n}"))
        assert whole.read_bytes() == cut.read_bytes(), (n, name)


def test_names_of_runs(imitated, monkeypatch):
    """Each variant has a folder of its own."""
    monkeypatch.chdir(imitated)
    opened = []

    def folder(cfg, domains, name):
        opened.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(irevla.setup, "baseline", folder)
    for variant in ({}, {"explores": "all"}, {"consolidates": "head"}):
        with pytest.raises(KeyboardInterrupt):
            irevla.main(irevla.Config(**variant))
    assert opened == ["irevla", "irevla-all-all", "irevla-head-head"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": ()}, "--tasks"),
        ({"tasks": ("nowhere",)}, "--domain nowhere"),
        ({"tasks": ("tabletop",)}, "runs/one: is of pointmass, the task of tabletop"),
        ({"lora_rank": 4}, "--lora-rank"),
        ({"bf16": True}, "--bf16"),
        ({"stage1": "runs/whole"}, "runs/whole: has no demonstrations"),
        ({"stage1": "runs/none"}, "runs/none"),
        ({"gamma": 1.5}, "--gamma"),
        ({"sl_batch": 0}, "--sl-batch"),
    ],
)
def test_bad_input_is_one_line(imitated, monkeypatch, given, says):
    monkeypatch.chdir(imitated)
    with pytest.raises(UserError) as error:
        irevla.main(irevla.Config(**SETTINGS | {"out": "runs/bad"} | given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs/bad").exists()
