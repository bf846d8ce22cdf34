"""RoboFuME (Yang, Sobol Mark et al., 2023, arXiv 2310.15145): offline Q-learning, then practice without resets.

From demonstrations of many tasks and a few of a new one and of its undoing, three things are learnt offline:

    the judge   r̂(o, l), "Is it done: {l}"; yes or no; frozen in practice, where it is the only reward
    the critic  Q(o, l, a) by Cal-QL: Bellman's error, and values of other actions pushed down to V^μ, not below
    the actor   π(a | o, l): climbs Q, and clones the demonstrations

Then it does the task and undoes it in turns. An operator, who is counted, resets a station after a fixed time or
when a block has fallen. An action is L tokens, so Q has a value for every number at every position, given the
tokens before it: expectations over actions are exact sums. No code or hyper-parameter was published; docs/baselines.md
says where ours come from. No d(o, g) is used anywhere in this file.

    python baselines/robofume.py --stage1 runs/tabletop,pairs=practice-stage1-s0
    python baselines/robofume.py --no-calibrate         # CQL in place of Cal-QL
    python baselines/robofume.py --bc-weight 0          # without the cloning term
    python baselines/robofume.py --reward truth         # an upper bound: true success as the reward
    python baselines/robofume.py --resume               # continue an interrupted run, exactly
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ranks, setup  # noqa: E402
from common.cli import cli  # noqa: E402
from common.demos import Demonstrations  # noqa: E402
from common.options import Count, Positive, ScaleFlags, Share, Size, Whole  # noqa: E402
from envs import tabletop  # noqa: E402
from envs.operator import Operator  # noqa: E402
from model import EFM  # noqa: E402
from rollout import Episodes, evaluate, metrics, rollout  # noqa: E402
from tokens import QUESTION_ACTION, Tokenizer, action_tokenizer  # noqa: E402

QUESTION_SUCCESS = "Is it done: {}"
NO, YES = 0, 1  # number tokens


@dataclass
class Config(ScaleFlags):
    stage1: str | None = None  # the run whose policy is the actor's start, whose demonstrations are the data
    seed: Whole | None = None  # None: Stage 1's
    reward: Literal["judge", "truth"] = "judge"  # in practice; truth: an upper bound, not RoboFuME
    calibrate: bool = True  # push values down to V^μ only; without it: CQL
    prior_data: bool = True  # demonstrations of the other tasks
    positives: Count = 1  # the last so many observations of a demonstration are a yes
    failures: Whole = 30  # failed episodes of each task for the judge, labelled by hand
    judge_updates: Count = 4000
    offline_updates: Count = 4000
    env_steps: Count = 100_000  # of practice, the failures' included
    num_envs: Count = 16  # stations
    reset_every: Positive = 100.0  # seconds between an operator's resets of a station: 1,000 steps
    warmup: Whole = 2000  # steps of practice before its first update
    steps_per_update: Count = 16
    batch: Count = 128  # half of it demonstrations, half practice
    gamma: Share = 0.99
    alpha: Size = 1.0  # weight of the conservative term
    eta: Size = 1.0  # weight of the actor's climb on Q
    bc_weight: Size = 1.0  # weight of its cloning term
    target_rate: Share = 0.005  # at which the target critic follows
    judge_lr: Positive = 1e-3
    actor_lr: Positive = 1e-4
    critic_lr: Positive = 3e-4


# --- the judge --------------------------------------------------------------------------------------------------------
class Judge(EFM):
    """r̂(o, l): yes where p(yes) > p(no)."""

    def log_probs_done(self, obs: dict[str, Tensor], goals: list[str]) -> Tensor:
        """log p of (no, yes), float (B, 2)."""
        prompts = [QUESTION_SUCCESS.format(g) for g in goals]
        answer = torch.zeros(len(goals), 1, dtype=torch.long, device=ranks.device())
        return self.log_probs(obs, prompts, answer, [(NO, YES + 1)])[0]

    def steps_to_go(self, obs: dict[str, Tensor], goals: list[str], steps: object) -> Tensor:
        """What `rollout` asks a reward model: 0 where the answer is yes, infinite elsewhere. Not a count of steps."""
        log_p = self.log_probs_done(obs, goals)
        return torch.where(log_p[:, YES] > log_p[:, NO], 0.0, torch.inf)


def new_judge(policy: EFM, env: tabletop.TabletopVectorEnv) -> Judge:
    """From scratch, with the policy's sizes and the question's words: it never learns steps to go."""
    texts = [QUESTION_SUCCESS.format(t) for t in env.instructions()] + list(env.state_names)
    return Judge(policy.cfg_without_vocabulary(), Tokenizer.train(texts)).to(ranks.device())


def judge_loss(judge: Judge, obs: dict[str, Tensor], goals: list[str], done: Tensor) -> Tensor:
    """-log p(done | o, "Is it done: {l}"), averaged; done long (B,), 0 or 1."""
    return F.nll_loss(judge.log_probs_done(obs, goals), done)


# --- the critic -------------------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """Two values Q_j,i(k) of each number k at each position i, given o, l and the tokens before i."""

    def __init__(self, policy: EFM, numbers: int):
        super().__init__()
        self.trunk = copy.deepcopy(policy)
        self.trunk.language_model.sparse = False  # its embeddings' gradient is dense here
        self.values = nn.Linear(policy.cfg.width, 2 * numbers)
        nn.init.zeros_(self.values.weight)
        nn.init.zeros_(self.values.bias)

    def forward(self, obs: dict[str, Tensor], prompts: list[str], tokens: Tensor) -> Tensor:
        """float (B, L, 2, K); tokens long (B, L)."""
        hidden = self.trunk.hidden(obs, prompts, tokens + self.trunk.tokenizer.loc)
        return self.values(hidden).unflatten(-1, (2, -1))


def probabilities(actor: EFM, obs: dict, prompts: list[str], tokens: Tensor, ranges: list, numbers: int) -> Tensor:
    """π_i(k), float (B, L, K), 0 for numbers that are not allowed at position i."""
    log_probs = actor.log_probs(obs, prompts, tokens, ranges)
    padded = [F.pad(lp.exp(), (first, numbers - end)) for lp, (first, end) in zip(log_probs, ranges, strict=True)]
    return torch.stack(padded, 1)


def targets(q: Tensor, pi: Tensor, q_next: Tensor, pi_next: Tensor, reward: Tensor, gamma: float) -> Tensor:
    """y_i = Σ_k π_i+1(k) min_j Q̄_j,i+1(k) for i < L; y_L = r + γ (1 - r) Σ_k π(k | o', l) min_j Q̄_j,1(k); (B, L).

    q float (B, L, 2, K) and pi (B, L, K) of (o, l, a); q_next (B, 2, K) and pi_next (B, K) of the first position of
    (o', l), the same l. A yes is terminal; a time-out and a reset are not. All values are probabilities: in [0, 1].
    """
    inside = (pi[:, 1:] * q[:, 1:].amin(2)).sum(-1)  # (B, L - 1)
    last = reward + gamma * (1 - reward) * (pi_next * q_next.amin(1)).sum(-1)  # (B,)
    return torch.cat([inside, last[:, None]], 1).clamp(0, 1)


def critic_loss(q: Tensor, tokens: Tensor, y: Tensor, pi: Tensor, v_mu: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(½ Σ_ij (Q_j,i(a_i) - y_i)², α Σ_ij (Σ_k π_i(k) max(Q_j,i(k), V^μ) - Q_j,i(a_i))), averaged over the batch.

    q float (B, L, 2, K); tokens (B, L); y (B, L); pi (B, L, K); v_mu (B,), -inf for CQL.
    """
    taken = q.gather(3, tokens[:, :, None, None].expand(-1, -1, 2, 1))[..., 0]  # (B, L, 2)
    bellman = 0.5 * (taken - y[:, :, None]).square().sum((1, 2)).mean()
    held_up = torch.maximum(q, v_mu[:, None, None, None])  # [RoboFuME L_Q]
    others = (pi[:, :, None] * held_up).sum(-1)  # (B, L, 2)
    return bellman, alpha * (others - taken).sum((1, 2)).mean()


def actor_climb(pi: Tensor, q: Tensor) -> Tensor:
    """-(1/σ) Σ_i Σ_k π_i(k) min_j Q_j,i(k), averaged; σ: the spread of Q under π, so that its scale does not matter."""
    q = q.detach().amin(2)  # (B, L, K)
    mean = (pi * q).sum(-1, keepdim=True)
    spread = (pi.detach() * (q - mean.detach()).square()).sum(-1).sqrt().mean().clamp(min=0.01)
    return -(mean[..., 0].sum(1) / spread).mean()


# --- data -------------------------------------------------------------------------------------------------------------
class Replay:
    """Tuples (o, l, a, r, o', V^μ) of practice."""

    def __init__(self):
        self.parts: list[dict] = []

    def __len__(self) -> int:
        return sum(len(part["goals"]) for part in self.parts)

    def add(self, episodes: Episodes, done: Tensor, gamma: float) -> None:
        """done bool (n, T + 1): what rewards each observation. V^μ = γ^(steps left - 1) where a yes came, else 0."""
        n, T = done.shape[0], done.shape[1] - 1
        place = torch.full((n, T + 1), -1)
        place[episodes.row, episodes.t] = torch.arange(len(episodes.row))
        following = place[episodes.row, episodes.t + 1]  # the next tuple, -1 where the episode ends
        after = {}
        for key, value in episodes.obs.items():
            after[key] = torch.where(
                (following < 0).view(-1, *[1] * (value.ndim - 1)), episodes.last[key][episodes.row], value[following]
            )
        left = torch.from_numpy(episodes.length)[episodes.row] - episodes.t
        v_mu = torch.where(done[:, -1][episodes.row], gamma ** (left - 1.0), 0.0)
        reward = done[episodes.row, episodes.t + 1].float()
        self.parts.append(
            {"obs": episodes.obs, "after": after, "goals": list(episodes.goals), "tokens": episodes.tokens,
             "reward": reward, "v_mu": v_mu}
        )  # fmt: skip

    def batch(self, n: int, rng: np.random.Generator) -> tuple:
        """(obs, after, goals, tokens, reward, v_mu) of n tuples."""
        ends = np.cumsum([len(part["goals"]) for part in self.parts])
        picked = []
        for row in rng.integers(ends[-1], size=n):
            k = int(np.searchsorted(ends, row, side="right"))
            picked.append((self.parts[k], int(row - ends[k])))
        stack = {key: torch.stack([part[key][i] for part, i in picked]) for key in ("tokens", "reward", "v_mu")}
        obs, after = (
            {k: torch.stack([part[key][k][i] for part, i in picked]) for k in picked[0][0][key]} for key in ("obs", "after")
        )
        return obs, after, [part["goals"][i] for part, i in picked], stack["tokens"], stack["reward"], stack["v_mu"]

    def state_dict(self) -> dict:
        return {"parts": self.parts}

    def load_state_dict(self, state: dict) -> None:
        self.parts = state["parts"]


def demonstrated(demos: Demonstrations, rows: np.ndarray, actions, gamma: float) -> tuple:
    """Tuples of demonstrations, as `Replay.batch`: r = 1 where the next observation is the final one."""
    obs, action, goals, left = demos.batch(rows, ranks.device())
    after = demos.observe(demos.index[rows] + 1, ranks.device())
    return obs, after, goals, actions.encode(action), (left == 1).float(), gamma ** (left - 1.0)


class Station(Operator):
    """The operator of stations that do a task and undo it in turns, beginning with doing after a reset."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        anew = self.env.fallen.any(1) | (self.steps > self.due)
        for i, before in enumerate(self.env.pairs):
            self.env.pairs[i] = "backward" if before == "forward" and not anew[i] else "forward"
        return super().reset(seed=seed, options=options)


def per_state(episodes: Episodes) -> dict[str, float]:
    """The judge's counts over every observation of the episodes (the paper's Table II)."""
    t = torch.arange(episodes.d.shape[1])
    seen = t <= torch.from_numpy(episodes.length)[:, None]
    yes, true = (episodes.d <= 0)[seen], episodes.truth[seen]
    return {
        "false_positives": ((yes & ~true).sum() / (~true).sum().clamp(min=1)).item(),
        "false_negatives": ((~yes & true).sum() / true.sum().clamp(min=1)).item(),
        "precision": ((yes & true).sum() / yes.sum().clamp(min=1)).item(),
        "base_rate": true.float().mean().item(),
    }
