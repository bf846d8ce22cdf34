"""RoboFuME: targets and losses by enumeration, what is learnt from, practice in turns, an exact resume."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stage1
from baselines import plumbing, robofume
from common import UserError, ranks
from common.demos import Demonstrations
from common.runs import Run, read_json
from common.setup import load_run
from common.weights import load_model
from envs import make_vec
from envs.tabletop import TabletopVectorEnv
from envs.tabletop_language import Meaning, texts
from rollout import Episodes
from tests import tiny
from tokens import StepsToGo, action_tokenizer

RANGES = action_tokenizer(**make_vec("tabletop", 1, obs="state").action_tokens).ranges


# --- equations --------------------------------------------------------------------------------------------------------
def toy(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two tuples, answers of two tokens, three numbers."""
    g = torch.Generator().manual_seed(seed)
    return {
        "q": torch.rand(2, 2, 2, 3, generator=g, dtype=torch.float64),
        "pi": torch.rand(2, 2, 3, generator=g, dtype=torch.float64).softmax(-1),
        "q_next": torch.rand(2, 2, 3, generator=g, dtype=torch.float64),
        "pi_next": torch.rand(2, 3, generator=g, dtype=torch.float64).softmax(-1),
    }


def test_targets_by_enumeration():
    x, reward, gamma = toy(), torch.tensor([0.0, 1.0]).double(), 0.9
    got = robofume.targets(**x, reward=reward, gamma=gamma)
    for b in range(2):
        second = sum(float(x["pi"][b, 1, k] * min(x["q"][b, 1, 0, k], x["q"][b, 1, 1, k])) for k in range(3))
        after = sum(float(x["pi_next"][b, k] * min(x["q_next"][b, 0, k], x["q_next"][b, 1, k])) for k in range(3))
        assert got[b, 0].item() == pytest.approx(second)
        assert got[b, 1].item() == pytest.approx([gamma * after, 1.0][b])


def test_a_yes_is_terminal_and_a_time_out_is_not():
    x = toy()
    other = x | {"q_next": x["q_next"] / 2}
    for reward, same in ((1.0, True), (0.0, False)):
        r = torch.full((2,), reward).double()
        a, b = (robofume.targets(**y, reward=r, gamma=0.9) for y in (x, other))
        assert torch.equal(a[:, 0], b[:, 0]) and torch.equal(a[:, 1], b[:, 1]) == same


def test_targets_are_probabilities():
    x = toy()
    x = x | {"q": x["q"] * 9 - 4, "q_next": x["q_next"] * 9}
    y = robofume.targets(**x, reward=torch.zeros(2).double(), gamma=0.9)
    assert ((y >= 0) & (y <= 1)).all() and (y == 1).any()


def test_critic_loss_by_enumeration():
    x, tokens, y = toy(), torch.tensor([[0, 2], [1, 1]]), torch.rand(2, 2).double()
    v_mu = torch.tensor([0.4, 0.7]).double()
    bellman, conservative = robofume.critic_loss(x["q"], tokens, y, x["pi"], v_mu, alpha=2.0)
    squares, pushed = 0.0, 0.0
    for b, i, j in itertools.product(range(2), repeat=3):
        taken = x["q"][b, i, j, tokens[b, i]]
        squares += float(0.5 * (taken - y[b, i]) ** 2) / 2
        held_up = sum(float(x["pi"][b, i, k]) * max(float(x["q"][b, i, j, k]), float(v_mu[b])) for k in range(3))
        pushed += 2.0 * (held_up - float(taken)) / 2
    assert bellman.item() == pytest.approx(squares) and conservative.item() == pytest.approx(pushed)


@pytest.mark.parametrize(("v_mu", "pushed_down"), [(1e9, "nothing"), (-math.inf, "all"), (0.5, "what is above")])
def test_values_are_pushed_down_to_what_the_data_returned(v_mu, pushed_down):
    """Cal-QL: with V^μ above every Q nothing is pushed down, with -inf it is CQL."""
    x, tokens = toy(), torch.tensor([[0, 2], [1, 1]])
    q = x["q"].clone().requires_grad_()
    _, loss = robofume.critic_loss(q, tokens, torch.zeros(2, 2).double(), x["pi"], torch.full((2,), v_mu).double(), 1.0)
    loss.backward()
    up = torch.zeros_like(q).scatter_(3, tokens[:, :, None, None].expand(-1, -1, 2, 1), 1.0) / 2
    down = x["pi"][:, :, None].expand_as(q) / 2
    down = {"nothing": 0 * down, "all": down, "what is above": down * (q > 0.5)}[pushed_down]
    assert torch.allclose(q.grad, (down - up).detach())


def test_the_actors_gradient_is_that_of_finite_differences():
    x = toy()
    logits = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = robofume.actor_climb(logits.softmax(-1), x["q"])
    loss.backward()
    q = x["q"].amin(2)
    pi = logits.detach().softmax(-1)
    mean = (pi * q).sum(-1, keepdim=True)
    sigma = float((pi * (q - mean) ** 2).sum(-1).sqrt().mean())  # not differentiated: it sets the scale
    assert sigma > 0.01

    def value(z: torch.Tensor) -> float:
        return float(-(z.softmax(-1) * q).sum((1, 2)).mean() / sigma)

    assert loss.item() == pytest.approx(value(logits.detach()))
    for at in itertools.product(range(2), range(2), range(3)):
        nudge = torch.zeros_like(logits)
        nudge[at] = 1e-6
        slope = (value(logits.detach() + nudge) - value(logits.detach() - nudge)) / 2e-6
        assert logits.grad[at].item() == pytest.approx(slope, abs=1e-6)


def test_a_flat_q_does_not_blow_up_the_climb():
    pi = torch.full((2, 2, 3), 1 / 3).requires_grad_()
    robofume.actor_climb(pi, torch.full((2, 2, 2, 3), 0.5)).backward()
    assert pi.grad.isfinite().all() and pi.grad.abs().max() <= 0.5 / 0.01


# --- one update -------------------------------------------------------------------------------------------------------
@pytest.fixture
def learner():
    torch.manual_seed(0)
    made = robofume.Learner(tiny.small("state", 0, "tabletop"), robofume.Config(seed=0), RANGES)
    torch.nn.init.normal_(made.critic.values.weight, std=0.3)
    made.target.load_state_dict(made.critic.state_dict())
    return made


def some_batch(n: int = 6, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    env = make_vec("tabletop", n, obs="state")
    obs, _ = env.reset(seed=seed)
    state = torch.from_numpy(obs["state"]).unflatten(1, (5, -1))
    tokens = torch.stack([torch.randint(a, b, (n,), generator=g) for a, b in RANGES], 1)
    after = state + 0.1 * torch.randn(state.shape, generator=g)
    return {"state": state, "after": after, "tokens": tokens, "reward": torch.zeros(n), "v_mu": torch.rand(n, generator=g),
            "goals": list(obs["instruction"])}  # fmt: skip


def test_the_policy_of_the_sums_is_the_one_that_acts(learner):
    batch = some_batch()
    obs = {"state": batch["state"]}
    prompts = [robofume.QUESTION_ACTION.format(g) for g in batch["goals"]]
    log_pi = learner.log_policy(obs, prompts, batch["tokens"])
    assert torch.allclose(log_pi.exp().sum(-1), torch.ones(6, 4), atol=1e-5)
    allowed = torch.zeros(4, 13, dtype=torch.bool)
    for i, (first, end) in enumerate(RANGES):
        allowed[i, first:end] = True
    assert ((log_pi > -torch.inf) == allowed).all()
    taken = log_pi.gather(2, batch["tokens"][..., None]).sum((1, 2))
    assert torch.allclose(taken, learner.actor.log_prob(obs, prompts, batch["tokens"], RANGES), atol=1e-5)


def test_o_prime_is_asked_with_the_same_sentence(learner, monkeypatch):
    """Also after a switch: the new sentence belongs to the next episode."""
    asked, hidden = [], robofume.EFM.hidden
    monkeypatch.setattr(
        robofume.EFM, "hidden", lambda self, obs, prompts, ids: (asked.append(prompts), hidden(self, obs, prompts, ids))[1]
    )
    batch = some_batch()
    learner.update(batch, 3, measure=False)
    want = [robofume.QUESTION_ACTION.format(g) for g in batch["goals"]]
    assert len(asked) == 5 and all(prompts == want for prompts in asked)  # actor, Q and target of o; two of o'


def test_what_an_update_reports(learner):
    told = learner.update(some_batch(), 3, measure=True)
    assert tuple(told) == robofume.Q_COLUMNS and all(map(math.isfinite, told.values()))
    assert told["calibration_gap"] == pytest.approx(told["q_data"] - told["mc_return"], abs=1e-6)
    assert told["grad_climb"] > 0 and told["grad_cloning"] > 0
    again = learner.update(some_batch(), 3, measure=False)
    assert math.isnan(again["grad_climb"]) and math.isnan(again["grad_cloning"])


def test_an_update_on_two_cores_ends_in_the_same_bytes(learner, monkeypatch):
    other = copy.deepcopy(learner)
    other.critic_optimizer = torch.optim.AdamW(other.critic.parameters(), lr=3e-4, weight_decay=0)
    other.actor_optimizer = torch.optim.AdamW(other.actor.parameters(), lr=1e-4, weight_decay=0)
    before = copy.deepcopy(learner.state_dict())
    told = [learner.update(some_batch(seed=seed), 3, measure=True) for seed in range(3)]
    monkeypatch.setattr(ranks, "sides", 2)
    assert [other.update(some_batch(seed=seed), 3, measure=True) for seed in range(3)] == told
    for name, weight in learner.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    for model in ("actor", "critic", "target"):
        assert any(not torch.equal(before[k], v) for k, v in learner.state_dict().items() if k.startswith(model)), model


def test_gradient_norms_are_those_of_the_two_terms(learner):
    """With one term's weight at 0, the step's own gradient has the other's norm."""
    for weights, column in (({"eta": 0.0}, "grad_cloning"), ({"bc_weight": 0.0}, "grad_climb")):
        learner.cfg = robofume.Config(seed=0, **weights)
        seen, clip = [], torch.nn.utils.clip_grad_norm_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(robofume.nn.utils, "clip_grad_norm_", lambda p, most, s=seen, c=clip: s.append(float(c(p, most))))
            told = learner.update(some_batch(), 3, measure=True)
        assert seen[1] == pytest.approx(told[column], rel=1e-4)  # the critic's comes first


def test_only_demonstrations_are_cloned(learner):
    """The tuples behind the first `cloned` do not count in bc_nll."""
    batch = some_batch()
    other = batch | {"tokens": torch.cat([batch["tokens"][:3], some_batch(seed=5)["tokens"][3:]])}
    a = robofume.copy.deepcopy(learner).update(batch, 3, measure=False)["bc_nll"]
    b = robofume.copy.deepcopy(learner).update(other, 3, measure=False)["bc_nll"]
    c = robofume.copy.deepcopy(learner).update(other, 6, measure=False)["bc_nll"]
    assert a == pytest.approx(b, rel=1e-5) and a != pytest.approx(c, rel=1e-3)


def test_the_target_follows_slowly(learner):
    before = [p.clone() for p in learner.target.parameters()]
    learner.update(some_batch(), 3, measure=False)
    moved = 0
    for old, slow, fast in zip(before, learner.target.parameters(), learner.critic.parameters(), strict=True):
        assert torch.allclose(slow, old + 0.005 * (fast - old), atol=1e-6)
        moved += int((slow != old).any())
    assert moved > 5 and not any(p.requires_grad for p in learner.target.parameters())


def test_the_critic_learns_a_reward_and_the_actor_climbs_it():
    """One state, a number that is paid: Q finds it, then the policy does."""
    torch.manual_seed(0)
    cfg = robofume.Config(seed=0, bc_weight=0.0, alpha=0.0, actor_lr=3e-3, critic_lr=3e-3, target_rate=0.2)
    learner = robofume.Learner(tiny.small("state", 0, "tabletop"), cfg, RANGES)
    one = some_batch(1)
    n = 32
    batch = {k: v * n if k == "goals" else v.repeat_interleave(n, 0) for k, v in one.items()}
    g = torch.Generator().manual_seed(1)
    paid = 4
    for _ in range(40):
        batch["tokens"] = torch.stack([torch.randint(a, b, (n,), generator=g) for a, b in RANGES], 1)
        batch["reward"] = (batch["tokens"][:, 3] == paid).float()
        batch["after"], batch["v_mu"] = batch["state"], torch.zeros(n)
        learner.cfg = dataclasses.replace(cfg, gamma=0.0)
        learner.update(batch, 1, measure=False)
    prompts = [robofume.QUESTION_ACTION.format(one["goals"][0])]
    with torch.no_grad():
        p = learner.log_policy({"state": one["state"]}, prompts, one["tokens"]).exp()[0, 3, paid]
    assert p > 0.5


# --- data -------------------------------------------------------------------------------------------------------------
def episodes(lengths: list[int], yes: list[bool]) -> tuple[Episodes, torch.Tensor]:
    """Episodes whose state is 100 i + t at step t of simulation i, in the order of a rollout."""
    pairs = [(i, t) for t in range(max(lengths)) for i, n in enumerate(lengths) if t < n]
    row, t = torch.tensor(pairs).T
    state = (100.0 * row + t)[:, None, None].expand(-1, 2, 3)
    last = torch.tensor([100.0 * i + n for i, n in enumerate(lengths)])[:, None, None].expand(-1, 2, 3)
    done = torch.zeros(len(lengths), max(lengths) + 1, dtype=torch.bool)
    for i, n in enumerate(lengths):
        done[i, n:] = yes[i]
    goals = np.array([f"goal {i}" for i in row.tolist()], dtype=object)
    d = torch.where(done, 0.0, torch.inf)
    tokens = torch.stack([row, t], 1)
    return Episodes({"state": state}, tokens, goals, t.float(), row, t, {"state": last}, d, done, np.array(lengths)), done


def test_tuples_of_practice_by_hand():
    r, done = episodes([3, 1, 2], [True, True, False])
    new = robofume.practised(r, done, gamma=0.5)
    for k, (i, t) in enumerate(zip(r.row.tolist(), r.t.tolist(), strict=True)):
        assert new["state"][k, 0, 0] == 100 * i + t and new["after"][k, 1, 2] == 100 * i + t + 1
        assert new["goals"][k] == f"goal {i}" and new["tokens"][k].tolist() == [i, t]
        left = r.length[i] - t
        assert new["reward"][k] == float(i < 2 and left == 1)
        assert new["v_mu"][k].item() == pytest.approx(0.5 ** (left - 1) if i < 2 else 0.0)


def test_a_store_keeps_rows_together():
    store = robofume.Store()
    for first in (0, 4):
        r, done = episodes([2, 2], [True, False])
        new = robofume.practised(r, done, 0.9)
        new["goals"] = [str(first + k) for k in range(4)]
        new["v_mu"] = torch.arange(4.0) + first
        store.add(new)
    batch = store.batch(50, np.random.default_rng(0))
    assert len(store) == 8 and set(batch["goals"]) == {str(k) for k in range(8)}
    assert [float(goal) for goal in batch["goals"]] == batch["v_mu"].tolist()


@pytest.fixture(scope="module")
def demos() -> Demonstrations:
    from common.demos import record

    data = record("tabletop,pairs=both", "state", 3, seed=0)
    return Demonstrations(data, np.arange(3), make_vec("tabletop", 1, obs="state").state_dim)


def test_tuples_of_demonstrations_by_hand(demos):
    actions = action_tokenizer(**make_vec("tabletop", 1, obs="state").action_tokens)
    new = robofume.demonstrated(demos, demos.acted, actions, gamma=0.9)
    data, k = demos.data, 0
    for start, length in zip(data["start"], data["length"], strict=True):
        for t in range(length - 1):  # the final observation has no action
            assert np.array_equal(new["state"][k].flatten(), data["state"][start + t])
            assert np.array_equal(new["after"][k].flatten(), data["state"][start + t + 1])
            assert new["reward"][k] == float(t == length - 2)
            assert new["v_mu"][k].item() == pytest.approx(0.9 ** (length - 2 - t), rel=1e-4)
            k += 1
    assert k == len(new["goals"]) == len(new["tokens"])
    assert torch.allclose(actions.decode(new["tokens"]), torch.from_numpy(data["action"][demos.index[demos.acted]]), atol=2e-3)


def test_the_judges_table_by_hand():
    r, _ = episodes([3, 1], [True, False])
    r.truth[0] = torch.tensor([False, True, False, True])
    r.truth[1] = torch.tensor([False, True, True, True])  # frozen behind the end, where nothing counts
    r.d[0] = torch.tensor([torch.inf, torch.inf, 0.0, 0.0])
    r.d[1] = torch.tensor([torch.inf, torch.inf, torch.inf, torch.inf])
    # seen: 4 + 2 states; yes: 2, of which 1 true; true: 1 + 1 + 1
    want = {"false_positive_rate": 1 / 3, "false_negative_rate": 2 / 3, "precision": 1 / 2, "base_rate": 1 / 2}
    assert plumbing.per_state(r, 0.0) == pytest.approx(want)
    shares = plumbing.per_task(r, ["forward", "backward"], ("forward", "backward", "second"))
    assert shares == pytest.approx({"true_forward": 1.0, "true_backward": 1.0, "true_second": math.nan}, nan_ok=True)


# --- the judge --------------------------------------------------------------------------------------------------------
def test_the_judge_knows_the_words_of_its_question_and_says_yes_or_no():
    env, policy = make_vec("tabletop", 5, obs="state"), tiny.small("state", 0, "tabletop")
    torch.manual_seed(0)
    judge = robofume.new_judge(policy, env)
    question = robofume.QUESTION_SUCCESS.format(env.instructions()[0])
    assert "<unk>" not in judge.tokenizer.tokenizer.encode(question).tokens
    obs, _ = env.reset(seed=0)
    seen = {"state": torch.from_numpy(obs["state"]).unflatten(1, (5, -1))}
    log_p = judge.log_probs_done(seen, list(obs["instruction"]))
    assert torch.allclose(log_p.exp().sum(1), torch.ones(5), atol=1e-5)
    says = judge.steps_to_go(seen, list(obs["instruction"]), None)
    assert torch.equal(says == 0, log_p[:, 1] > log_p[:, 0]) and torch.equal(says != 0, says == torch.inf)
    done = torch.tensor([0, 1, 0, 1, 1])
    loss = robofume.judge_loss(judge, {"state": seen["state"], "goals": list(obs["instruction"]), "done": done})
    assert loss.item() == pytest.approx(-log_p[range(5), done].mean().item(), rel=1e-5)


# --- practice ---------------------------------------------------------------------------------------------------------
def stations_of(n: int, seconds: float) -> robofume.Station:
    return robofume.Station(make_vec("tabletop,pairs=both", n, obs="state"), 0, every=(seconds, seconds))


def test_stations_do_and_undo_in_turns_and_begin_with_doing():
    stations = stations_of(8, 100.0)
    stations.reset(seed=0)
    assert stations.env.pairs == ["forward"] * 8 and stations.interventions == 0
    for want in ("backward", "forward", "backward"):
        before = stations.env.get_state()["sim_state"].copy()
        stations.steps += 100
        stations.reset(seed=1)
        moved = (stations.env.get_state()["sim_state"] != before).any(1)
        assert stations.interventions == 0 and not moved.any()  # everything stays where it is
        assert stations.env.pairs == [want] * 8
        meant = {(m.block, m.target) for m in stations.env.meanings}
        assert meant == {(0, 3) if want == "forward" else (0, 2)}


def test_a_station_is_reset_after_its_time_or_a_fall_and_counted():
    stations = stations_of(4, 100.0)
    stations.reset(seed=0)
    stations.steps += np.array([1000, 1001, 5, 5])  # 1,000 steps are 100 seconds
    stations.env.fallen[2, 1] = True
    stations.reset(seed=50)
    assert stations.interventions == 2 and stations.steps.tolist() == [1000, 0, 0, 5]
    assert stations.env.pairs == ["backward", "forward", "forward", "backward"]
    assert not stations.env.fallen.any()


def test_where_nothing_is_to_undo_a_station_is_reset_and_does():
    """The red moon lies at the green star already: after the operator's reset the task comes first."""
    stations = stations_of(2, 1000.0)
    stations.reset(seed=0)
    stations.env.sim.qpos[0, 6:8] = stations.env.sim.qpos[0, 0:2] + [0.01, 0.045]
    stations.reset(seed=1)
    assert stations.env.pairs == ["forward", "backward"] and stations.interventions == 1
    assert (stations.env.meanings[0].block, stations.env.meanings[0].target) == (0, 3)
    assert stations.steps[0] == 0


# --- whole runs -------------------------------------------------------------------------------------------------------
SETTINGS = {"stage1": "runs/one", "failures": 4, "judge_updates": 3, "offline_updates": 3, "env_steps": 90,
            "num_envs": 4, "warmup": 12, "steps_per_update": 8, "batch": 8, "eval_episodes": 2, "reset_least": 2.0,
            "reset_most": 4.0}  # fmt: skip


@pytest.fixture(scope="module")
def practised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robofume")
    with pytest.MonkeyPatch.context() as patch, tiny.tiny_presets():
        # twelve steps where a policy acts, all of them where demonstrations are recorded
        horizon = property(lambda self: 12 if vars(self).get("num_envs", 9) <= 8 else 100, lambda self, value: None)
        patch.setattr(TabletopVectorEnv, "horizon", horizon, raising=False)
        sizes = tiny.SIZES | {"sinusoidal_numbers": 0.0, "state_sinusoids": 0}
        patch.setitem(tiny.PRESETS, "nano-deep", dataclasses.replace(tiny.PRESETS["nano-deep"], **sizes))
        patch.setattr(robofume, "LOOK", 2)
        patch.chdir(folder)
        how = {"updates": 2, "batch": 8, "eval_every": 2, "eval_episodes": 2}
        stage1.main(stage1.Config(domain="tabletop,pairs=both", episodes=20, out="runs/one", **how))
        stage1.main(stage1.Config(domain="tabletop,pairs=prior", episodes=10, out="runs/other", **how))
        robofume.main(robofume.Config(**SETTINGS, out="runs/whole"))
        patch.setattr(plumbing, "evaluate", lambda *_: {})  # once is enough
        yield folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_what_a_run_logs(practised):
    told = rows(practised / "runs/whole")
    offline = [row for row in told if row["true_at_end"] == "nan"]
    practice = [row for row in told if row["true_at_end"] != "nan"]
    assert [row["updates"] for row in offline] == ["2", "3"] and len(practice) >= 2
    assert all(row["q_data"] != "nan" and row["grad_climb"] != "nan" and row["interventions"] == "nan" for row in offline)
    assert all(0 <= float(row[k]) <= 1 for row in practice for k in ("precision", "base_rate", "false_positive_rate"))
    # nothing is learnt before the first `warmup` tuples; then one update in 8 steps
    assert practice[0]["updates"] == "3" and practice[0]["q_data"] == "nan"
    summary, config = read_json(practised / "runs/whole/summary.json"), read_json(practised / "runs/whole/config.json")
    failures = int(offline[0]["env_steps"])
    assert failures >= 4 * 12 and int(practice[-1]["env_steps"]) == summary["env_steps"] >= 90
    learnt = int(practice[-1]["updates"]) - 3
    warm = [int(row["env_steps"]) for row in practice if int(row["updates"]) == 3][-1]
    assert learnt == summary["env_steps"] // 8 - warm // 8 > 0
    assert (config["domain"], config["gamma"], summary["interventions"]) == (
        "tabletop,pairs=both",
        0.99,
        int(practice[-1]["interventions"]),
    )


def test_practice_leaves_the_judge_alone_and_changes_the_actor(practised, monkeypatch):
    """The judge's file is written before practice, and what judged to the end has its bytes."""
    monkeypatch.chdir(practised)
    seen, acts = [], robofume.act

    def watched(actor, judge, *args):
        if judge is not None:
            seen.append(({k: v.clone() for k, v in judge.state_dict().items()}, [p.requires_grad for p in judge.parameters()]))
        return acts(actor, judge, *args)

    given, made = [], robofume.practised
    monkeypatch.setattr(robofume, "act", watched)
    monkeypatch.setattr(robofume, "practised", lambda r, done, gamma: (given.append((r, done)), made(r, done, gamma))[1])
    robofume.main(robofume.Config(**SETTINGS, out="runs/watched"))
    assert len(given) >= 2 and all(torch.equal(done, r.d <= 0) for r, done in given)  # it alone rewards
    kept = load_model(practised / "runs/watched/judge.safetensors").state_dict()
    assert len(seen) >= 2
    for weights, learns in seen:
        assert not any(learns) and all(torch.equal(kept[k], v) for k, v in weights.items())
    offline, policy, start = (
        load_model(practised / name).state_dict()
        for name in ("runs/whole/offline.safetensors", "runs/whole/policy.safetensors", "runs/one/policy.safetensors")
    )
    for a, b in ((start, offline), (offline, policy)):
        assert any(not torch.equal(a[k], b[k]) for k in a)
    reward = [(practised / run / "reward.safetensors").read_bytes() for run in ("runs/one", "runs/whole")]
    assert reward[0] == reward[1]


def test_the_judge_learns_from_failures_and_from_final_observations(practised, monkeypatch):
    """An eighth of each batch are failures, all a no; of the rest an eighth is a yes, a demonstration's last observation."""
    monkeypatch.chdir(practised)
    batches, loss = [], robofume.judge_loss
    monkeypatch.setattr(robofume, "judge_loss", lambda judge, batch: (batches.append(batch), loss(judge, batch))[1])

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(robofume, "load_model", stop)  # the judge is ready
    with pytest.raises(KeyboardInterrupt):
        robofume.main(robofume.Config(**SETTINGS | {"batch": 128}, out="runs/judged"))
    learnt = [b for b in batches if len(b["goals"]) == 128]
    held_out = [b for b in batches if len(b["goals"]) == 2048]
    assert len(learnt) == 3 and len(held_out) == 2
    assert all((b["done"][-16:] == 0).all() and b["done"].sum() == 14 for b in learnt)
    data = np.load(next((practised / "data").glob("tabletop,pairs=both*.npz")))
    finals = {data["state"][i].tobytes() for i in data["start"] + data["length"] - 1}
    others = {row.tobytes() for row in data["state"]} - finals
    found = {0: 0, 1: 0}
    for b in [*({k: v[:112] for k, v in b.items()} for b in learnt), *held_out]:
        for state, done in zip(b["state"].numpy(), b["done"].tolist(), strict=True):
            assert state.tobytes() in (finals if done else others)
            found[done] += 1
    assert min(found.values()) > 10


def test_one_in_eight_that_the_judge_sees_of_demonstrations_is_a_yes():
    """Steps to go 2 1 0 and 3 2 1 0; acted rows are all but the last of each."""
    demos = SimpleNamespace(steps=torch.tensor([2, 1, 0, 3, 2, 1, 0]))
    rng, acted = np.random.default_rng(0), np.array([0, 1, 3, 4, 5])
    rows = plumbing.to_judge(demos, acted, 800, 1, rng)
    assert len(rows) == 800 and np.isin(rows, (2, 6)).sum() == 100
    assert set(rows) == set(range(7))  # with the final observations, every row
    assert set(plumbing.to_judge(demos, acted[:2], 80, 1, rng)) == {0, 1, 2}  # of the first demonstration alone
    rows = plumbing.to_judge(demos, acted, 800, 2, rng)[:100]
    assert set(rows) == {1, 2, 5, 6}  # two of each are a yes
    assert plumbing.to_judge(demos, acted, 3, 1, rng)[0] in (2, 6)  # one at least


def test_half_of_the_demonstrations_are_of_the_task(practised, monkeypatch):
    """D_f and D_b are found again in the data by their texts; without prior data they are all."""
    monkeypatch.chdir(practised)
    task = {text for a, b in ((0, 3), (0, 2)) for text in texts(Meaning("block2block", a, b), 4)}
    asked, judged = [], []

    def watched(made, told):
        def watch(demos, rows, *args):
            batch = made(demos, rows, *args)
            told.append([goal in task for goal in batch["goals"]])
            return batch

        return watch

    monkeypatch.setattr(robofume, "demonstrated", watched(robofume.demonstrated, asked))
    monkeypatch.setattr(robofume, "observed", watched(robofume.observed, judged))
    both = robofume.setup.baseline

    def mixed(*args):
        """Every second demonstration of another task."""
        *rest, (train, valid) = both(*args)
        train.instruction = train.instruction.copy()
        train.instruction[::2] = "push the blue cube to the green star"
        return *rest, (train, valid)

    monkeypatch.setattr(robofume.setup, "baseline", mixed)
    robofume.main(robofume.Config(**SETTINGS | {"env_steps": 1}, out="runs/mixed"))
    assert len(asked) == 3 and all(all(goals[4:]) for goals in asked) and not all(all(goals) for goals in asked)
    _, *judged_ = judged  # the first are held out
    assert len(judged_) == 3 and all(all(goals[3:]) for goals in judged_) and not all(all(goals) for goals in judged_)
    asked.clear()
    judged.clear()
    robofume.main(robofume.Config(**SETTINGS | {"env_steps": 1}, prior_data=False, out="runs/alone"))
    assert len(asked) == 3 and all(all(goals) for goals in asked)
    assert len(judged) == 4 and all(all(goals) for goals in judged[1:])


def test_true_reward_is_an_option_and_not_the_default(practised, monkeypatch):
    monkeypatch.chdir(practised)
    given, made = [], robofume.practised
    monkeypatch.setattr(robofume, "practised", lambda r, done, gamma: (given.append((r, done)), made(r, done, gamma))[1])
    robofume.main(robofume.Config(**SETTINGS, reward="truth", out="runs/by-truth"))
    assert given and all(torch.equal(done, r.truth) for r, done in given)
    assert robofume.Config().reward == "judge"


def test_our_detector_is_an_option_that_changes_the_reward_alone(practised, monkeypatch):
    """r = 1[d <= s] of Stage 1's reward model; what is learnt before practice is the same, byte for byte."""
    monkeypatch.chdir(practised)
    given, made = [], robofume.practised
    monkeypatch.setattr(robofume, "practised", lambda r, done, gamma: (given.append((r, done)), made(r, done, gamma))[1])
    robofume.main(robofume.Config(**SETTINGS, reward="detector", out="runs/by-detector"))
    env, _, reward_model = load_run(practised / "runs/one", 1)
    s, steps = read_json(practised / "runs/one/summary.json")["success_threshold"], StepsToGo(env.steps_cap, env.steps_bins)
    assert s > 0 and len(given) >= 2
    for r, done in given:
        assert torch.equal(done, r.d <= s)
        first = r.t == 0
        d = reward_model.steps_to_go({"state": r.obs["state"][first]}, r.goals[first.numpy()].tolist(), steps)
        assert torch.allclose(r.d[:, 0], d, atol=1e-4)
    told = [row for row in rows(practised / "runs/by-detector") if row["true_at_end"] != "nan"]
    for row, (r, done) in zip(told, given, strict=True):
        assert float(row["detected"]) == pytest.approx(float(done[:, -1].float().mean()))
        assert float(row["precision"]) == pytest.approx(plumbing.per_state(r, s)["precision"], abs=1e-5)
    for name in ("judge", "offline"):
        judged, detected = (practised / f"runs/{run}/{name}.safetensors" for run in ("whole", "by-detector"))
        assert judged.read_bytes() == detected.read_bytes()


@pytest.mark.parametrize("n", [1, 3, 5])
def test_an_interrupted_run_ends_in_the_same_bytes(practised, monkeypatch, n):
    """Stopped after the n-th checkpoint: while the judge learns, in the offline phase, in practice."""
    monkeypatch.chdir(practised)
    calls, checkpoint = [], Run.checkpoint

    def stop(self):
        checkpoint(self)
        calls.append(self.tracked["progress"])
        if len(calls) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "checkpoint", stop)
        robofume.main(robofume.Config(**SETTINGS, out=f"runs/cut{n}"))
    now = calls[-1]
    assert (now.judge_update, now.updates, now.row) == {1: (2, 0, 0), 3: (3, 2, 1), 5: (3, 3, 3)}[n]
    robofume.main(robofume.Config(**SETTINGS, out=f"runs/cut{n}", resume=True))
    assert tiny.metrics(practised / f"runs/cut{n}") == tiny.metrics(practised / "runs/whole")
    for name in ("judge", "offline", "policy"):
        whole, cut = (practised / f"runs/{run}/{name}.safetensors" for run in ("whole", f"cut{n}"))
        assert whole.read_bytes() == cut.read_bytes(), (n, name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stage1": "runs/other"}, "runs/other: has no demonstration of the task"),
        ({"stage1": "runs/whole"}, "runs/whole: has no demonstrations"),
        ({"stage1": "runs/none"}, "runs/none"),
        ({"compile": True}, "--compile"),
        ({"checkpointing": True}, "--checkpointing"),
        ({"failures": 0}, "--failures"),
        ({"batch": 7}, "--batch 7: must be at least 8"),
        ({"target_rate": 1.1}, "--target-rate"),
    ],
)
def test_bad_input_is_one_line(practised, monkeypatch, given, says):
    monkeypatch.chdir(practised)
    with pytest.raises(UserError) as error:
        robofume.main(robofume.Config(**SETTINGS | {"out": "runs/bad"} | given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs/bad").exists()


def test_a_policy_that_never_fails_is_refused(practised, monkeypatch):
    monkeypatch.chdir(practised)
    monkeypatch.setattr(TabletopVectorEnv, "_success", lambda self: np.ones(self.num_envs, bool))
    with pytest.raises(UserError, match="never fails"):
        robofume.main(robofume.Config(**SETTINGS, out="runs/perfect"))
