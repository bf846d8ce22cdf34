"""The rollout's bookkeeping, what is counted of it, and evaluation: numbers that agree with each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import envs.pointmass
from common import counting, ranks
from common.counting import confirmed_detections, confusion, evaluate, metrics
from common.runs import wilson
from rollout import Buffer, Episodes, encode_observation, rollout
from tests.tiny import small, stage1_run
from tokens import QUESTION_ACTION, StepsToGo, action_tokenizer

EPISODES = 12


# --- rollouts ---------------------------------------------------------------------------------------------
class Watched(envs.pointmass.PointmassVectorEnv):
    """The domain, that keeps what it has shown and what it was told."""

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self.seen, self.told, self.success = [result[0]], [], [result[1]["is_success"]]
        return result

    def step(self, actions):
        result = super().step(actions)
        self.seen.append(result[0])
        self.told.append(np.array(actions))
        self.success.append(result[4]["is_success"])
        return result


def close_by(env: envs.pointmass.PointmassVectorEnv) -> np.ndarray:
    """Success at a distance that some untrained policies come to by chance."""
    return np.linalg.norm(env.pos - env._goal(), axis=1) < 0.75


def truly(d: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return truth


def never(d: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """No episode ends before the horizon."""
    return torch.zeros_like(truth)


def practise(obs: str, end: str, quantile: float = 0.3, n: int = 6, horizon: int = 15):
    """A rollout of untrained models, with s such that some episodes end early and others do not."""
    policy, reward_model, env = small(obs, 0), small(obs, 1), Watched(n, obs)
    env.horizon = horizon
    if end == "ground-truth":  # goals close by, and large: some are met by chance
        env._success = lambda: close_by(env)
    probe_ends = never if end == "detector" else truly
    probe = rollout(policy, reward_model, env, 9, torch.Generator().manual_seed(1), probe_ends)
    s = probe.d.flatten().quantile(quantile).item()

    def ends(d: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return d <= s if end == "detector" else truth

    r = rollout(policy, reward_model, env, 9, torch.Generator().manual_seed(1), ends)
    return r, policy, reward_model, env, s


@pytest.mark.parametrize("end", ["detector", "ground-truth"])
@pytest.mark.parametrize("obs", ["state", "images"])
def test_rollout_bookkeeping(obs, end):
    r, policy, reward_model, env, s = practise(obs, end)
    n, T, length = env.num_envs, r.d.shape[1] - 1, r.length
    assert length.min() < length.max(), "the test needs episodes of different lengths"
    assert length.max() == T and r.truth.shape == (n, T + 1) and r.tokens.shape == (length.sum(), 2)
    # tuples: every (simulation, time) of every episode, once
    pairs = list(zip(r.row.tolist(), r.t.tolist(), strict=True))
    assert sorted(pairs) == [(i, t) for i in range(n) for t in range(length[i])]
    assert np.bincount(r.row, minlength=n).tolist() == length.tolist()
    # what a tuple holds is what was seen, said and done there
    actions, steps = action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    for m, (i, t) in enumerate(pairs):
        assert r.goals[m] == env.seen[0]["instruction"][i]
        np.testing.assert_array_equal(env.told[t][i], actions.decode(r.tokens[m]).numpy())
        if obs == "state":
            np.testing.assert_array_equal(r.obs["state"][m].flatten().numpy(), env.seen[t]["state"][i])
    with torch.no_grad():
        if obs == "images":  # the features kept from the step before equal those of the frames themselves
            frames = torch.from_numpy(np.stack([env.seen[t]["images"][i] for i, t in pairs]))
            torch.testing.assert_close(r.obs["features"], policy.encode_images(frames), atol=1e-5, rtol=1e-5)
        prompts = [QUESTION_ACTION.format(g) for g in r.goals]
        log_probs = policy.log_probs(r.obs, prompts, r.tokens, actions.ranges)
        entropy = sum(torch.distributions.Categorical(logits=lp).entropy() for lp in log_probs)
        torch.testing.assert_close(r.entropy, entropy, atol=1e-4, rtol=1e-4)
        # d and truth at every observation, frozen after the end
        for i in range(n):
            shown = [min(t, length[i]) for t in range(T + 1)]
            raw = torch.from_numpy(np.stack([env.seen[t][obs][i] for t in shown]))
            its = {"state": raw.unflatten(1, (-1, 2))} if obs == "state" else {"images": raw}
            d = reward_model.steps_to_go(its, [env.seen[0]["instruction"][i]] * (T + 1), steps)
            torch.testing.assert_close(r.d[i], d, atol=1e-3, rtol=1e-4)
            assert r.truth[i].tolist() == [bool(env.success[t][i]) for t in shown]
    # how episodes end
    last = r.d[:, -1]
    over = (last <= s).numpy() if end == "detector" else r.truth[:, -1].numpy()
    assert (length[~over] == env.horizon).all() and over[length < env.horizon].all()
    inner = [x for i in range(n) for x in (r.d[i, 1 : length[i]] <= s if end == "detector" else r.truth[i, 1 : length[i]])]
    assert not any(inner)  # at the first time, not a later one
    # the last observation of every simulation
    for i in range(n):
        final = torch.from_numpy(env.seen[length[i]][obs][i])
        if obs == "state":
            assert torch.equal(r.last["state"][i].flatten(), final)
        else:
            with torch.no_grad():
                encoded = policy.encode_images(final[None])[0]
            torch.testing.assert_close(r.last["features"][i], encoded, atol=1e-5, rtol=1e-5)
    # rewards: 0 after the end, and their sum telescopes
    reward = r.d[:, :-1] - r.d[:, 1:]
    for i in range(n):
        assert not reward[i, length[i] :].any()
        assert reward[i].sum().item() == pytest.approx((r.d[i, 0] - last[i]).item(), abs=1e-3)


def test_a_rollout_repeats_with_its_seed_and_generator():
    policy, env = small("state", 0), envs.make_vec("pointmass", 4)
    env.horizon = 8
    a, b, c = (rollout(policy, policy, env, seed, torch.Generator().manual_seed(5), never) for seed in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.d, b.d) and not torch.equal(a.d, c.d)


def test_a_rollout_without_a_reward_model_is_the_same_but_for_d():
    policy, env = small("state", 0), envs.make_vec("pointmass", 4)
    env.horizon = 5
    a, b = (rollout(policy, m, env, 1, torch.Generator().manual_seed(5), never) for m in (policy, None))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.truth, b.truth) and torch.equal(a.row, b.row)
    assert torch.equal(a.obs["state"], b.obs["state"]) and b.d.shape == a.d.shape and b.d.isposinf().all()


def test_a_greedy_rollout_takes_the_most_probable_tokens():
    policy, env = small("state", 0), envs.make_vec("pointmass", 4)
    env.horizon = 5
    a, b = (rollout(policy, policy, env, 1, torch.Generator().manual_seed(g), never, greedy=True) for g in (5, 6))
    assert torch.equal(a.tokens, b.tokens)
    ranges = action_tokenizer(**env.action_tokens).ranges
    with torch.no_grad():
        log_probs = policy.log_probs(a.obs, [QUESTION_ACTION.format(g) for g in a.goals], a.tokens, ranges)
    assert torch.equal(a.tokens, torch.stack([lp.argmax(-1) for lp in log_probs], 1))


def test_a_step_encodes_only_the_new_frame(monkeypatch):
    model, env = small("images", 0, "tabletop"), envs.make_vec("tabletop,history=1", 3, obs="images")
    assert not env.simultaneous
    first, _ = env.reset(seed=0)
    second = env.step(env.demonstrate())[0]
    encoded, encode = [], model.encode_images

    def count(images):
        encoded.append(images.shape[:2].numel())
        return encode(images)

    monkeypatch.setattr(model, "encode_images", count)
    with torch.no_grad():
        before = encode_observation(model, first, np.arange(3), None)
        after = encode_observation(model, second, np.arange(3), before)
        again = encode_observation(model, second, np.arange(3), None)
        subset = encode_observation(model, second, np.array([2]), {k: v[2:] for k, v in before.items()})
    assert encoded == [6, 3, 6, 1]
    torch.testing.assert_close(after["features"], again["features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subset["features"], again["features"][2:], atol=1e-5, rtol=1e-5)


# --- counting ---------------------------------------------------------------------------------------------
def test_confusion():
    detected = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    truth = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1, 1], bool)
    assert confusion(detected, truth) == {
        "true_positives": 1, "false_positives": 2, "false_negatives": 3, "true_negatives": 4,
        "precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 4)}  # fmt: skip


def test_confusion_without_a_class():
    every, never = np.ones(3, bool), np.zeros(3, bool)
    table = confusion(every, every)
    assert table["true_positives"] == 3 and table["precision"] == table["recall"] == 1
    assert confusion(every, never)["precision"] == confusion(never, every)["recall"] == 0


def test_confirmed_detections():
    d = np.array([
        [9, 2, 9, 9, 9, 9],  # fires at 1, true at 3: kept for s >= 2
        [9, 2, 2, 9, 9, 1],  # fires at 1, true at 5: too late for s = 3, later detections do not count
        [9, 9, 9, 9, 3, 9],  # d = s fires at 4, true at 4
        [9, 9, 9, 9, 9, 9],  # never fires: not asked
        [9, 9, 9, 9, 9, 1],  # fires on the last observation, never true
    ], float)  # fmt: skip
    truth = np.zeros((5, 6), bool)
    truth[0, 3], truth[1, 5], truth[2, 4:], truth[3, 5] = True, True, True, True
    assert confirmed_detections(d, truth, 3.0) == [True, False, True, False]
    assert confirmed_detections(d, truth, 2.0) == [True, False, False]  # the third row no longer fires
    assert confirmed_detections(d, truth, 2.5) == [True, False, False]  # within ceil(2.5) = 3 steps
    assert confirmed_detections(d, truth, 0.5) == []  # nothing fires


def test_success_before_the_detection_alone_does_not_count():
    d, truth = np.array([[9.0, 9, 9, 1, 9]]), np.array([[False, True, False, False, False]])
    assert confirmed_detections(d, truth, 1.0) == [False]


def test_a_batch_is_changed_by_the_symmetries_and_by_nothing_else():
    """Each tuple by an element of its own, and its return stays; without symmetries nothing changes."""
    env = envs.make_vec("pointmass", 24, obs="state")
    actions = action_tokenizer(**env.action_tokens)
    model, generator = small("state", 0), torch.Generator().manual_seed(0)
    env.horizon = 2
    r = rollout(model, model, env, 0, generator, lambda d, truth: truth)
    numbered = torch.arange(48.0)
    returns = torch.zeros(24, 2)
    returns[r.row, r.t] = numbered  # so that a return says which tuple it is of
    seen, elements = [], set()
    for symmetries in (None, env.symmetries):
        buffer = Buffer(symmetries, actions)
        buffer.place(r, returns)
        for obs, prompts, tokens, one in buffer.batches(48, 16, torch.Generator().manual_seed(1)):
            for k, j in enumerate(one.long().tolist()):
                same = torch.equal(obs["state"][k], r.obs["state"][j]) and torch.equal(tokens[k], r.tokens[j])
                if symmetries is None:
                    assert same and prompts[k] == f"What robot action to {r.goals[j]}"
                    continue
                every = np.arange(symmetries.order)
                state = r.obs["state"][j].expand(len(every), -1, -1)
                action = actions.decode(r.tokens[j]).expand(len(every), -1)
                changed, action, goals = symmetries(every, {"state": state}, action, [r.goals[j]] * len(every))
                hit = (changed["state"] == obs["state"][k]).flatten(1).all(1) & (actions.encode(action) == tokens[k]).all(1)
                hit &= torch.tensor([prompts[k] == f"What robot action to {g}" for g in goals])
                assert hit.sum() == 1
                elements.add(int(hit.nonzero()))
                seen.append(j)
    assert sorted(seen) == list(range(48)) and len(elements) > 20


def episodes(length: list[int], d: list[float], truth: list[bool], entropy: list[float]) -> Episodes:
    """Episodes of which only what `metrics` reads is there; d and truth at the end."""
    return Episodes(
        obs={},
        tokens=torch.zeros(sum(length), 2, dtype=torch.long),
        goals=np.array(["the red goal"] * sum(length), dtype=object),
        entropy=torch.tensor(entropy),
        row=torch.zeros(sum(length), dtype=torch.long),
        t=torch.zeros(sum(length), dtype=torch.long),
        last={},
        d=torch.tensor([[9.0, x] for x in d]),
        truth=torch.tensor([[False, x] for x in truth]),
        length=np.array(length),
    )


def test_metrics():
    two = [
        episodes([2, 3], [1.0, 5.0], [True, True], [0.0, 1.0, 2.0, 3.0, 4.0]),
        episodes([1, 2], [3.0, 3.5], [False, False], [5.0, 6.0, 7.0]),
    ]
    returns = torch.tensor([-1.0, 1.0, 1.0, 3.0, -1.0, 1.0, 1.0, 3.0])
    assert metrics(two, returns, 3.0) == {
        "true_at_end": 2 / 4,
        "detected": 2 / 4,  # d = 3 is detected
        "false_positives": 1 / 4,
        "mean_steps": 2.0,
        "return_mean": 1.0,
        "return_std": pytest.approx((16 / 7) ** 0.5),
        "return_negative": 2 / 8,
        "entropy": 3.5,
    }


# --- evaluation -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An untrained model in a run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "pointmass-stage1-s0"
    stage1_run(folder, "state")
    return folder


@pytest.fixture
def short(monkeypatch) -> None:
    """Episodes of few steps."""
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "horizon", 20)


@pytest.fixture
def watched(monkeypatch) -> list[Episodes]:
    """What `evaluate` has rolled out."""
    seen = []

    def watch(*args, **kwargs):
        seen.append(rollout(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(counting, "rollout", watch)
    return seen


@pytest.mark.parametrize("s", [3.0, 69.0, 200.0])
def test_evaluate_is_consistent(run, s, short):
    r = evaluate(run, EPISODES, seed=1, s=s)
    n = {k: r[k] for k in ("true_positives", "false_positives", "false_negatives", "true_negatives")}
    assert r["eval_episodes"] == EPISODES and sum(n.values()) == EPISODES and all(v >= 0 for v in n.values())
    assert 0 <= r["success_low"] <= r["success"] <= r["success_high"] <= 1
    assert r["success_low"] < r["success_high"] and r["success_threshold"] == s
    assert (r["success_low"], r["success_high"]) == wilson(round(r["success"] * EPISODES), EPISODES)
    assert 1 <= r["mean_steps"] <= 20 and 0 <= r["confirmed_detections"] <= 1
    assert r["precision"] == n["true_positives"] / max(1, n["true_positives"] + n["false_positives"])
    assert r["recall"] == n["true_positives"] / max(1, n["true_positives"] + n["false_negatives"])
    if s == 200:  # above every d: each episode is ended at once, by the detector
        assert n["true_positives"] + n["false_positives"] == EPISODES
    if s == 3:  # an untrained d is about 70: the detector never fires
        assert n["true_positives"] + n["false_positives"] == 0 and r["confirmed_detections"] == 0


def test_evaluate_is_repeatable_and_seeded(run, short, monkeypatch):
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "_success", close_by)
    a, b, c = (evaluate(run, 4, seed=seed, s=69.0) for seed in (0, 0, 3))
    assert a == b
    assert a != c


def test_evaluate_is_the_same_on_two_sides(run, short, monkeypatch):
    one = evaluate(run, 4, seed=0, s=69.0)
    monkeypatch.setattr(ranks, "sides", 2)
    assert evaluate(run, 4, seed=0, s=69.0) == one


def test_next_to_no_temperature_is_greedy(run, watched, short):
    for how in ({"temperature": 1e-6}, {"greedy": True}, {}):
        evaluate(run, 4, 0, 69.0, **how)
    cold, greedy, drawn = (r.tokens for r in watched[::2])
    assert torch.equal(cold, greedy) and not torch.equal(greedy, drawn)


def test_the_first_hundred_episodes_do_not_depend_on_how_many_there_are(run, watched, monkeypatch):
    """And nothing but a chunk of them is in memory, without observations."""
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "horizon", 3)
    assert counting.CHUNK == 100
    results = {n: evaluate(run, n, 0, 69.0) for n in (100, 250)}
    assert [len(r.length) for r in watched] == [100, 100] + 2 * [100, 100, 50]  # success, then the detector
    assert all(r.obs == {} for r in watched)
    alone, of_many = watched[:2], watched[2::3]
    for a, b in zip(alone, of_many, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.d, b.d) and torch.equal(a.truth, b.truth)
        assert a.goals.tolist() == b.goals.tolist() and a.length.tolist() == b.length.tolist()
    drawn = {tuple(r.tokens.flatten().tolist()) for r in watched[2:]}
    assert len(drawn) == 6 and len({tuple(r.goals) for r in watched[2:]}) == 6  # no chunk has another's episodes
    for n, result in results.items():
        table = [result[k] for k in ("true_positives", "false_positives", "false_negatives", "true_negatives")]
        assert result["eval_episodes"] == sum(table) == n
