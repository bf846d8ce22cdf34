"""iRe-VLA (Guo et al., 2025, arXiv 2501.16664): reinforcement learning explores, supervised learning consolidates.

A policy cloned from demonstrations meets new tasks one after another. For each of them:

    1  PPO on sparse true success trains the action head φ and a new critic; the backbone θ is frozen    Eq. 3
    2  the successes join the demonstrations, and cloning trains θ and φ on both                         Eq. 4

The paper published no code and no hyper-parameter: those below are ours, docs/baselines.md says where they come from.
Actions are tokens, so a likelihood stands for the paper's squared error. No d(o, g) is used anywhere in this file.

    python baselines/irevla.py --stage1 runs/tabletop,pairs=prior-stage1-s0
    python baselines/irevla.py --explores all                    # PPO-Replay: PPO on all weights
    python baselines/irevla.py --consolidates head               # iRe-VLA-freeze: the backbone never learns
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import plumbing  # noqa: E402
from common import ranks, setup  # noqa: E402
from common.cli import cli  # noqa: E402
from common.counting import metrics  # noqa: E402
from common.demos import Demonstrations  # noqa: E402
from common.options import Count, Positive, ScaleFlags, Share, Whole, fill  # noqa: E402
from model import EFM  # noqa: E402
from rollout import Episodes  # noqa: E402
from stage1 import bc_loss  # noqa: E402
from tokens import QUESTION_ACTION, action_tokenizer  # noqa: E402

LOOK = 500  # updates of cloning between two rows of metrics.csv
SL_COLUMNS = ("sl_update", "nll_demonstrations", "nll_successes")
RL_COLUMNS = (*plumbing.EPISODE_COLUMNS, "successes", "explained_variance", "kl", "updates")


@dataclass
class Config(ScaleFlags):
    stage1: str | None = None  # the run whose policy is π⁰ and whose demonstrations are D_e; None: the newest
    tasks: tuple[str, ...] = ("tabletop,pairs=forward", "tabletop,pairs=second")  # T_1, T_2, ..., in turn
    explores: Literal["head", "all"] = "head"  # what PPO trains: φ, or θ and φ (PPO-Replay)
    consolidates: Literal["all", "head"] = "all"  # what cloning trains: θ and φ, or φ (iRe-VLA-freeze)
    seed: Whole | None = None  # None: Stage 1's
    env_steps: Count = 150_000  # of PPO on each task
    num_envs: Count = 16  # simulations
    tuples: Count = 2048  # at least so many, of whole episodes, before PPO's epochs
    minibatch: Count = 256
    gamma: Share = 0.99
    gae_lambda: Share = 0.95
    clip: Positive = 0.2
    epochs: Count | None = None  # over the tuples; None: 4 where the head learns, 1 where all weights do
    max_kl: Positive = 0.03  # leave the epochs as soon as a minibatch is further than this from the policy that acted
    lr: Positive | None = None  # PPO's; None: 3e-4 for the head, 1e-4 for all weights
    critic_lr: Positive = 1e-3
    warmup: Whole = 2  # iterations of each task in which its new critic learns alone
    least_successes: Whole = 8  # with fewer, an iteration says nothing about what is better
    successes: Count = 512  # to collect of each task after PPO ...
    collect_steps: Count = 100_000  # ... in at most so many steps
    sl_updates: Count = 2000
    sl_batch: Count = 128  # half of it demonstrations, half successes
    sl_lr: Positive = 3e-4


# --- heads ------------------------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """V(o, l) from what predicts the action's first token: the prefix's last hidden state has seen all of it."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 1))

    def renew(self, seed: int) -> None:
        """Forget everything, and say 0."""
        torch.manual_seed(seed)
        self.layers[0].reset_parameters()
        for p in self.layers[2].parameters():
            nn.init.zeros_(p)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, L, D) -> (B,)
        return self.layers(hidden[:, 0])[:, 0]


def with_action_head(model: EFM) -> EFM:
    """The same policy with a new action head, which adds nothing yet."""
    headed = EFM(replace(model.cfg, action_head=4 * model.cfg.width), model.tokenizer).to(ranks.device())
    headed.load_state_dict(headed.state_dict() | model.state_dict())
    return headed


def learners(policy: EFM, what: str) -> list[nn.Parameter]:
    """Let the head (φ) or all weights (θ and φ) have gradients, and return them."""
    for name, p in policy.named_parameters():
        p.requires_grad_(what == "all" or name.startswith("action_head."))
    return [p for p in policy.parameters() if p.requires_grad]


# --- PPO --------------------------------------------------------------------------------------------------------------
def gae(reward: Tensor, value: Tensor, length: np.ndarray, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V(o_{t+1}) - V(o_t), float (n, T); success and the horizon are terminal.

    reward, value float (n, T), 0 behind an episode's end; length int (n,).
    """
    n, T = reward.shape
    alive = torch.arange(T + 1) < torch.from_numpy(length)[:, None]  # (n, T + 1)
    value = torch.cat([value, torch.zeros(n, 1)], 1)  # (n, T + 1)
    advantage = torch.zeros(n, T + 1)
    for t in reversed(range(T)):
        delta = reward[:, t] + gamma * value[:, t + 1] * alive[:, t + 1] - value[:, t]
        advantage[:, t] = (delta + gamma * lam * advantage[:, t + 1]) * alive[:, t]
    return advantage[:, :T]


def ppo_loss(log_prob: Tensor, before: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-E min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), ρ = exp(log p - log p before); float (B,) each."""
    ratio = (log_prob - before).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()  # [iRe-VLA Eq. 3]


def action_log_prob(policy: EFM, hidden: Tensor, tokens: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """log p of the action's tokens (B, L) from hidden float (B, L, D), among the numbers allowed: float (B,)."""
    total = 0
    for i, (first, end) in enumerate(ranges):
        logits = policy.logits(hidden[:, i], policy.number_ids(first, end)).float()  # (B, K)
        total = total + logits.log_softmax(-1).gather(1, tokens[:, i, None] - first)[:, 0]
    return total


class Tuples:
    """The M tuples of one iteration's episodes, as PPO needs them."""

    @torch.no_grad()
    def __init__(self, policy: EFM, critic: Critic, rollouts: list[Episodes], cfg: Config, ranges: list):
        self.policy, self.critic, self.ranges = policy, critic, ranges
        self.state = torch.cat([r.obs["state"] for r in rollouts])
        self.tokens = torch.cat([r.tokens for r in rollouts])
        self.prompts = [QUESTION_ACTION.format(g) for r in rollouts for g in r.goals]
        # once for all epochs: those of a frozen backbone stay what they are
        rows = torch.arange(len(self.tokens))
        self.kept = torch.cat([self.hidden(i) for i in rows.split(cfg.minibatch)])  # (M, L, D)
        self.before = action_log_prob(policy, self.kept, self.tokens, ranges)  # (M,), of the policy that acted
        value, advantage = critic(self.kept).cpu(), []
        for r, mine in zip(rollouts, value.split([len(r.tokens) for r in rollouts]), strict=True):
            by_time, reward = torch.zeros(2, len(r.length), r.truth.shape[1] - 1)  # (n, T) each
            by_time[r.row, r.t] = mine
            reward[range(len(r.length)), r.length - 1] = r.truth[:, -1].float()  # R: 1 if it was done
            advantage.append(gae(reward, by_time, r.length, cfg.gamma, cfg.gae_lambda)[r.row, r.t])
        self.advantage = torch.cat(advantage).to(self.tokens.device)  # (M,)
        self.returns = self.advantage + value.to(self.tokens.device)
        self.successes = sum(int(r.truth[:, -1].sum()) for r in rollouts)

    def hidden(self, i: Tensor) -> Tensor:
        """What predicts the actions of tuples i, float (B, L, D)."""
        prompts = [self.prompts[k] for k in i.tolist()]
        return self.policy.hidden({"state": self.state[i]}, prompts, self.tokens[i] + self.policy.tokenizer.loc)


def ppo(data: Tuples, optimizer: torch.optim.Optimizer, cfg: Config, generator: torch.Generator, critic_alone: bool):
    """The epochs of one iteration. Returns what is logged of it."""
    spread = data.advantage.std().clamp(min=0.05)  # where all episodes fail, or none does, it is only noise
    advantage = (data.advantage - data.advantage.mean()) / spread
    explained = 1 - data.advantage.var() / data.returns.var().clamp(min=1e-9)
    told = {"successes": data.successes, "explained_variance": explained.item(), "kl": 0.0, "updates": 0}
    for _ in range(cfg.epochs):
        for i in torch.randperm(len(data.tokens), generator=generator).split(cfg.minibatch):
            hidden = data.kept[i] if critic_alone or cfg.explores == "head" else data.hidden(i)
            loss = 0.5 * (data.critic(hidden) - data.returns[i]).square().mean()
            if not critic_alone:
                log_prob = action_log_prob(data.policy, hidden, data.tokens[i], data.ranges)
                loss = loss + ppo_loss(log_prob, data.before[i], advantage[i], cfg.clip)
                log_ratio = (log_prob - data.before[i]).detach()
                told["kl"] = (log_ratio.exp() - 1 - log_ratio).mean().item()  # an estimate that is never below 0
                if told["kl"] > cfg.max_kl:
                    return told
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            told["updates"] += 1
    return told


# --- D_RL -------------------------------------------------------------------------------------------------------------
@dataclass
class Successes:
    """D_RL: the tuples of successful episodes, task by task."""

    tasks: list[dict] = field(default_factory=list)

    def add(self, rollouts: list[Episodes]) -> None:
        """A task's successful episodes; the others are left out."""
        mine = [r.truth[:, -1][r.row] for r in rollouts]
        state = torch.cat([r.obs["state"][i] for r, i in zip(rollouts, mine, strict=True)])
        tokens = torch.cat([r.tokens[i] for r, i in zip(rollouts, mine, strict=True)])
        goals = [goal for r, i in zip(rollouts, mine, strict=True) for goal in r.goals[i.numpy()]]
        if goals:
            self.tasks.append({"state": state, "tokens": tokens, "goals": goals})

    def batch(self, n: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], list[str], Tensor]:
        """(observations, goals, tokens) of n tuples; every task is as likely as the others."""
        state, goals, tokens = [], [], []
        for k, task in enumerate(self.tasks):
            rows = rng.integers(len(task["goals"]), size=n // len(self.tasks) + (k < n % len(self.tasks)))
            state.append(task["state"][rows])
            goals += [task["goals"][i] for i in rows]
            tokens.append(task["tokens"][rows])
        return {"state": torch.cat(state)}, goals, torch.cat(tokens)


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
@dataclass
class Progress(plumbing.Counts):
    """What a run continues from, beside the weights."""

    task: int = 0
    phase: str = "new"  # of the task: new, rl, sl
    rl_iteration: int = 0  # of PPO in this task
    rl_steps: int = 0  # of PPO in this task
    update: int = 0  # of cloning in this task


def collect(policy: EFM, env: VectorEnv, cfg: Config, now: Progress, generator: torch.Generator,
            tuples: int, successes: float = math.inf) -> list[Episodes]:  # fmt: skip
    """Rounds of one episode a simulation, to true success or the horizon, until there is enough of one; counted."""
    rollouts, steps, reached = [], 0, 0
    while steps < tuples and reached < successes:
        rollouts.append(plumbing.act(policy, None, env, cfg, now, generator, lambda d, truth: truth))
        steps += len(rollouts[-1].tokens)
        reached += int(rollouts[-1].truth[:, -1].sum())
    return rollouts


def sl_losses(policy: EFM, demos: Demonstrations, found: Successes, cfg: Config, rng: np.random.Generator, actions):
    """-log p(a | o, l) of half a batch of D_e, and of half a batch of D_RL; of D_e alone while nothing was found."""
    half = cfg.sl_batch // 2 if found.tasks else 0
    obs, action, goals, _ = demos.batch(rng.choice(demos.acted, cfg.sl_batch - half), ranks.device())
    losses = [bc_loss(policy, obs, goals, actions.encode(action).to(ranks.device()), actions.ranges)]
    if half:
        losses.append(bc_loss(policy, *found.batch(half, rng), actions.ranges))
    return losses


def main(cfg: Config) -> None:
    fill(cfg, {"epochs": 4, "lr": 3e-4} if cfg.explores == "head" else {"epochs": 1, "lr": 1e-4})
    name = f"irevla-{cfg.explores}-{cfg.consolidates}".removesuffix("-head-all")
    tasks, run, policy, reward_model, (demos, _) = setup.baseline(cfg, cfg.tasks, name)
    if run.done:
        return
    torch.manual_seed(cfg.seed)
    policy = with_action_head(policy)  # π¹, π² := π⁰  [iRe-VLA Alg. 1, line 1]
    critic, found, now = Critic(policy.cfg.width).to(ranks.device()), Successes(), Progress()
    actions = action_tokenizer(**tasks[0].action_tokens)
    groups = [{"params": learners(policy, cfg.explores)}, {"params": critic.parameters(), "lr": cfg.critic_lr}]
    ppo_optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=0)
    sl_optimizer = torch.optim.AdamW(learners(policy, cfg.consolidates), lr=cfg.sl_lr, weight_decay=0)
    generator, rng = torch.Generator().manual_seed(cfg.seed), np.random.default_rng(cfg.seed)
    run.track(policy=policy, critic=critic, found=found, ppo=ppo_optimizer, sl=sl_optimizer)
    run.track(generator=generator, rng=rng, progress=now)
    run.start(policy=policy, reward=reward_model)

    def log(row: dict[str, float], tell: bool, **kept: EFM) -> None:
        plumbing.log(run, now, RL_COLUMNS + SL_COLUMNS, row, tell, kept, task=now.task + 1)

    while now.task < len(tasks):  # [iRe-VLA Alg. 1, line 2]
        env, name = tasks[now.task], f"task{now.task + 1}"
        if now.phase == "new":
            critic.renew(cfg.seed + now.task)  # [iRe-VLA Alg. 1, line 4]
            ppo_optimizer.state.clear()
            now.phase, now.rl_iteration, now.rl_steps = "rl", 0, 0
        learners(policy, cfg.explores)
        while now.phase == "rl" and now.rl_steps < cfg.env_steps:  # [iRe-VLA Alg. 1, line 5]
            rollouts = collect(policy, env, cfg, now, generator, cfg.tuples)
            data = Tuples(policy, critic, rollouts, cfg, actions.ranges)
            alone = now.rl_iteration < cfg.warmup or data.successes < cfg.least_successes
            row = metrics(rollouts, data.returns, 0.0) | ppo(data, ppo_optimizer, cfg, generator, alone)
            now.rl_iteration += 1
            now.rl_steps += len(data.tokens)
            log(row, tell=now.rl_iteration % 10 == 0, policy=policy)
        if now.phase == "rl":
            run.keep(**{f"{name}_rl": policy})
            rollouts = collect(policy, env, cfg, now, generator, cfg.collect_steps, cfg.successes)
            found.add(rollouts)  # [iRe-VLA Alg. 1, line 6]
            sl_optimizer.state.clear()
            now.phase, now.update = "sl", 0  # π² := π¹, the same weights  [iRe-VLA Alg. 1, line 8]
            run.checkpoint()
        learners(policy, cfg.consolidates)
        for update in run.steps(now.update, cfg.sl_updates, f"{name}: supervised"):
            sl_optimizer.param_groups[0]["lr"] = setup.learning_rate(update, cfg.sl_updates, cfg.sl_lr)
            losses = sl_losses(policy, demos, found, cfg, rng, actions)
            loss = sum(losses) / len(losses)  # [iRe-VLA Eq. 4]
            sl_optimizer.zero_grad()
            loss.backward()
            sl_optimizer.step()  # [iRe-VLA Alg. 1, line 9]
            if (update + 1) % LOOK == 0:
                now.update = update + 1
                told = [now.update, *(loss.item() for loss in losses)]
                log(dict(zip(SL_COLUMNS, told, strict=False)), tell=True)
        run.keep(**{f"{name}_sl": policy, "policy": policy})
        now.phase, now.task = "new", now.task + 1
        run.checkpoint()

    plumbing.finish(run, cfg, now, tasks[0], "irevla")


if __name__ == "__main__":
    cli(Config, main)
