"""iRe-VLA: its equations by hand, what each phase may change, and an exact resume."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stage1
from baselines import irevla
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


def test_successes_alone_are_kept():
    env = make_vec("pointmass", 6, obs="state")
    r = rollout(tiny.small("state", 0), None, env, 0, torch.Generator().manual_seed(0), lambda d, truth: truth)
    r.truth[:, -1] = torch.tensor([True, False, True, False, True, True])
    found = irevla.Successes()
    assert found.add([r], most=3) == 3  # the first three
    kept = torch.isin(r.row, torch.tensor([0, 2, 4]))
    assert torch.equal(found.tasks[0]["tokens"], r.tokens[kept]) and len(found.tasks[0]["goals"]) == int(kept.sum())
    obs, goals, tokens = found.batch(10, np.random.default_rng(0))
    assert len(goals) == len(tokens) == len(obs["state"]) == 10


# --- whole runs -------------------------------------------------------------------------------------------------------
SETTINGS = {"stage1": "runs/one", "tasks": ("pointmass", "pointmass"), "env_steps": 80, "num_envs": 4, "tuples": 40,
            "minibatch": 20, "warmup": 0, "least_successes": 0, "attempts": 4, "successes": 2, "sl_updates": 501,
            "sl_batch": 4, "eval_episodes": 2}  # fmt: skip


@pytest.fixture(scope="module")
def imitated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("irevla")

    def renew(self: irevla.Critic, seed: int = 0) -> None:
        """Says anything, and not 0: these untrained policies never succeed, and without a surprise nothing is learnt."""
        torch.manual_seed(seed)
        self.layers[0].reset_parameters()
        self.layers[2].reset_parameters()

    with pytest.MonkeyPatch.context() as patch, tiny.tiny_presets():
        patch.setattr(irevla.Critic, "renew", renew)
        patch.setattr(PointmassVectorEnv, "horizon", 12)
        patch.chdir(folder)
        stage1.main(stage1.Config(episodes=20, updates=2, batch=8, eval_every=2, eval_episodes=2, out="runs/one"))
        yield folder


@pytest.mark.parametrize(("explores", "consolidates"), [("head", "all"), ("all", "all"), ("head", "head")])
def test_each_phase_changes_what_it_may(imitated, monkeypatch, explores, consolidates):
    monkeypatch.chdir(imitated)
    folder = imitated / f"runs/{explores}-{consolidates}"
    cfg = irevla.Config(**SETTINGS, explores=explores, consolidates=consolidates, out=str(folder))
    irevla.main(cfg)
    start, rl, sl = (load_model(folder / f"{n}.safetensors") for n in ("task1_rl", "task1_sl", "task2_rl"))
    original = load_model(imitated / "runs/one/policy.safetensors").state_dict()

    def moved(a: dict, b: dict) -> set[str]:
        """Which of head and backbone differ."""
        return {"head" if k.startswith("action_head") else "backbone" for k in a if k in b and not torch.equal(a[k], b[k])}

    after_rl, after_sl, after_second = (m.state_dict() for m in (start, rl, sl))
    assert ("backbone" in moved(original, after_rl)) == (explores == "all")
    assert "head" in moved(after_rl, after_sl)
    assert ("backbone" in moved(after_rl, after_sl)) == (consolidates == "all")
    assert ("backbone" in moved(after_sl, after_second)) == (explores == "all")
    rows = tiny.metrics(folder)
    assert rows[0][:3] == ["iteration", "task", "env_steps"] and {row[1] for row in rows[1:]} == {"1", "2"}


def test_an_interrupted_run_ends_in_the_same_bytes(imitated, monkeypatch):
    monkeypatch.chdir(imitated)
    irevla.main(irevla.Config(**SETTINGS, out="runs/whole"))
    for n in (1, 3, 5):
        calls = SimpleNamespace(n=0)
        checkpoint = irevla.setup.Run.checkpoint

        def stop(self, calls=calls, n=n, checkpoint=checkpoint):
            checkpoint(self)
            calls.n += 1
            if calls.n == n:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(irevla.setup.Run, "checkpoint", stop)
            irevla.main(irevla.Config(**SETTINGS, out=f"runs/cut{n}"))
        irevla.main(irevla.Config(**SETTINGS, out=f"runs/cut{n}", resume=True))
        assert tiny.metrics(imitated / f"runs/cut{n}") == tiny.metrics(imitated / "runs/whole")
        for name in ("task1_rl", "task1_sl", "task2_sl", "policy"):
            whole, cut = (imitated / f"runs/{run}/{name}.safetensors" for run in ("whole", f"cut{n}"))
            assert whole.read_bytes() == cut.read_bytes(), (n, name)
