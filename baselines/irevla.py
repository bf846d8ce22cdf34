"""iRe-VLA (Guo et al., 2025, arXiv 2501.16664): reinforcement learning explores, supervised learning consolidates.

A policy cloned from demonstrations meets new tasks one after another. For each of them:

    1  PPO on true sparse success trains the action head φ and a new critic; the backbone θ is frozen    Eq. 3
    2  the successes join the demonstrations, and cloning trains θ and φ on both                         Eq. 4

The paper published no code and no hyper-parameter: those below are ours, and docs/baselines.md says where they
come from. Differences from the paper: actions are tokens, so a likelihood stands for its squared error; the action
head is a residual MLP before the tied logits; nano models have no LoRA. No d(o, g) is used anywhere in this file.

    python baselines/irevla.py --stage1 runs/tabletop,pairs=prior-stage1-s0
    python baselines/irevla.py --explores all                    # PPO-Replay: PPO on all weights
    python baselines/irevla.py --consolidates head               # iRe-VLA-freeze: the backbone never learns
    python baselines/irevla.py --resume                          # continue an interrupted run, exactly
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ranks, setup  # noqa: E402
from common.cli import cli  # noqa: E402
from common.demos import Demonstrations  # noqa: E402
from common.options import Count, Positive, ScaleFlags, Share, Whole  # noqa: E402
from model import EFM  # noqa: E402
from rollout import Episodes, evaluate, metrics, rollout  # noqa: E402
from stage1 import bc_loss  # noqa: E402
from tokens import QUESTION_ACTION, action_tokenizer  # noqa: E402


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
    max_kl: Positive = 0.03  # leave the epochs beyond this mean KL
    lr: Positive | None = None  # PPO's; None: 3e-4 for the head, 1e-4 for all weights
    critic_lr: Positive = 1e-3
    warmup: Whole = 2  # iterations in which the new critic learns alone
    least_successes: Whole = 8  # with fewer an iteration says nothing about what is better
    successes: Count = 512  # kept of each task, out of at most `attempts` episodes
    attempts: Count = 1024
    sl_updates: Count = 2000
    sl_batch: Count = 128  # half of it demonstrations, half successes
    sl_lr: Positive = 3e-4


# --- heads ------------------------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """V(o, l) from what predicts the action's first token: the prefix's last hidden state has seen all of it."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 1))
        self.renew()

    def renew(self, seed: int = 0) -> None:
        """Forget everything, and say 0."""
        torch.manual_seed(seed)
        self.layers[0].reset_parameters()
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, L, D) -> (B,)
        return self.layers(hidden[:, 0])[:, 0]


def with_action_head(model: EFM) -> EFM:
    """The same policy with a new action head, which adds nothing yet."""
    if model.cfg.action_head:
        return model
    headed = EFM(replace(model.cfg, action_head=4 * model.cfg.width), model.tokenizer).to(ranks.device())
    headed.load_state_dict(model.state_dict(), strict=False)
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
    advantage = torch.zeros_like(reward)
    following = torch.zeros(n)
    for t in reversed(range(T)):
        goes_on = torch.from_numpy(t + 1 < length)
        next_value = value[:, t + 1] * goes_on if t + 1 < T else torch.zeros(n)
        delta = reward[:, t] + gamma * next_value - value[:, t]
        following = (delta + gamma * lam * following * goes_on) * torch.from_numpy(t < length)
        advantage[:, t] = following
    return advantage


def ppo_loss(log_prob: Tensor, before: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-E min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), ρ = exp(log p - log p before); float (B,) each."""
    ratio = (log_prob - before).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()  # [iRe-VLA Eq. 3]


def action_log_prob(policy: EFM, hidden: Tensor, tokens: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """log p of the action's tokens (B, L) from hidden float (B, L, D), among the numbers allowed: float (B,)."""
    total = torch.zeros(len(tokens), device=tokens.device)
    for i, (first, end) in enumerate(ranges):
        logits = policy.logits(hidden[:, i : i + 1], policy.number_ids((first, end)))[:, 0].float()  # (B, K)
        chosen = (tokens[:, i] - first)[:, None]
        total = total + logits.log_softmax(-1).gather(1, chosen)[:, 0]
    return total


class Tuples:
    """The tuples of one iteration's episodes, as PPO needs them."""

    @torch.no_grad()
    def __init__(self, policy: EFM, critic: Critic, rollouts: list[Episodes], cfg: Config, ranges: list):
        self.policy, self.frozen = policy, cfg.explores == "head"
        self.obs = {k: torch.cat([r.obs[k] for r in rollouts]) for k in rollouts[0].obs}
        self.tokens = torch.cat([r.tokens for r in rollouts])
        self.prompts = [QUESTION_ACTION.format(g) for r in rollouts for g in r.goals]
        # the backbone is frozen while the head explores: its hidden states are computed once for all epochs
        parts = torch.arange(len(self.tokens)).split(cfg.minibatch)
        self.kept = torch.cat([self._hidden(i) for i in parts])  # (M, L, D)
        self.before = action_log_prob(policy, self.kept, self.tokens, ranges)
        value, advantages = critic(self.kept).cpu(), []
        for r in rollouts:
            mine, value = value[: len(r.tokens)], value[len(r.tokens) :]
            by_time = torch.zeros(r.truth.shape[0], r.truth.shape[1] - 1)
            by_time[r.row, r.t] = mine
            reward = torch.zeros_like(by_time)
            reward[range(len(r.length)), r.length - 1] = r.truth[:, -1].float()  # 1 if the task was done, else 0
            advantages.append(gae(reward, by_time, r.length, cfg.gamma, cfg.gae_lambda)[r.row, r.t])
        self.advantage = torch.cat(advantages).to(self.tokens.device)  # (M,)
        self.returns = self.advantage + critic(self.kept)
        self.successes = sum(int(r.truth[:, -1].sum()) for r in rollouts)

    def _hidden(self, i: Tensor) -> Tensor:
        ids = self.tokens[i] + self.policy.tokenizer.loc
        prompts = [self.prompts[k] for k in i.tolist()]
        return self.policy.hidden({k: v[i] for k, v in self.obs.items()}, prompts, ids)

    def hidden(self, i: Tensor) -> Tensor:
        """What predicts the actions of tuples i, float (B, L, D); with gradients where the backbone learns."""
        return self.kept[i] if self.frozen else self._hidden(i)


def ppo(
    policy: EFM, critic: Critic, optimizer: torch.optim.Optimizer, data: Tuples, cfg: Config, ranges: list,
    generator: torch.Generator, critic_alone: bool,
) -> dict[str, float]:  # fmt: skip
    """The epochs of one iteration. Returns what is logged of it."""
    spread = data.advantage.std().clamp(min=0.05)  # a batch in which all fail, or none, has hardly any
    advantage = (data.advantage - data.advantage.mean()) / spread
    kl = torch.zeros(())
    for _ in range(cfg.epochs):
        for i in torch.randperm(len(data.tokens), generator=generator).split(cfg.minibatch):
            hidden = data.hidden(i)
            value = critic(hidden.detach() if critic_alone else hidden)
            loss = 0.5 * (value - data.returns[i]).square().mean()
            if not critic_alone:
                log_prob = action_log_prob(policy, hidden, data.tokens[i], ranges)
                loss = loss + ppo_loss(log_prob, data.before[i], advantage[i], cfg.clip)
                kl = (data.before[i] - log_prob).detach().mean()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
        if kl > cfg.max_kl:
            break
    explained = 1 - (data.returns - critic(data.kept).detach()).var() / data.returns.var().clamp(min=1e-9)
    return {"kl": kl.item(), "explained_variance": explained.item(), "successes": data.successes}


# --- D_RL -------------------------------------------------------------------------------------------------------------
class Successes:
    """D_RL: the tuples of successful episodes, task by task."""

    def __init__(self):
        self.tasks: list[dict] = []

    def add(self, rollouts: list[Episodes], most: int) -> int:
        """Keep a task's successful episodes, at most so many. Returns how many there were."""
        obs, tokens, goals, kept = [], [], [], 0
        for r in rollouts:
            chosen = r.truth[:, -1] & (r.truth[:, -1].cumsum(0) <= most - kept)
            mine = chosen[r.row]
            obs.append({k: v[mine] for k, v in r.obs.items()})
            tokens.append(r.tokens[mine])
            goals += list(r.goals[mine.numpy()])
            kept += int(chosen.sum())
        joined = {k: torch.cat([o[k] for o in obs]) for k in obs[0]}
        self.tasks.append({"obs": joined, "tokens": torch.cat(tokens), "goals": goals})
        return kept

    def batch(self, n: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], list[str], Tensor]:
        """(observations, goals, tokens) of n tuples; every task is as likely as the others."""
        picked = []
        full = [task for task in self.tasks if task["goals"]]
        for k, task in enumerate(full):
            rows = rng.integers(len(task["goals"]), size=n // len(full) + (k < n % len(full)))
            obs = {key: v[rows] for key, v in task["obs"].items()}
            picked.append((obs, [task["goals"][i] for i in rows], task["tokens"][rows]))
        obs, goals, tokens = zip(*picked, strict=True)
        return {k: torch.cat([o[k] for o in obs]) for k in obs[0]}, sum(goals, []), torch.cat(tokens)

    def state_dict(self) -> dict:
        return {"tasks": self.tasks}

    def load_state_dict(self, state: dict) -> None:
        self.tasks = state["tasks"]


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run continues from, beside the weights."""

    task: int = 0
    phase: str = "new"  # of the task: new, rl, sl
    iteration: int = 0  # of PPO, over all tasks
    steps: int = 0  # of the simulations in this task
    env_steps: int = 0  # in all, the collection of successes included
    episodes: int = 0
    update: int = 0  # of cloning in this task


def collect(policy: EFM, env: VectorEnv, cfg: Config, now: Progress, generator: torch.Generator) -> Episodes:
    """One episode of each simulation, ended by true success or the horizon; counted."""
    seed = 10**9 * (cfg.seed + 1) + now.episodes
    episodes = rollout(policy, None, env, seed, generator, lambda d, truth: truth)
    now.episodes += env.num_envs
    now.env_steps += int(episodes.length.sum())
    return episodes


def clone(policy: EFM, demos: Demonstrations, found: Successes, cfg: Config, rng: np.random.Generator, actions) -> Tensor:
    """-log p(a | o, l) of a batch, half of it demonstrations, half successes; all demonstrations where there are none."""
    half = cfg.sl_batch // 2 if any(task["goals"] for task in found.tasks) else 0
    obs, action, goals, _ = demos.batch(rng.choice(demos.acted, cfg.sl_batch - half), ranks.device())
    loss = bc_loss(policy, obs, goals, actions.encode(action).to(ranks.device()), actions.ranges)
    if half == 0:
        return loss
    obs, goals, tokens = found.batch(half, rng)
    return (loss + bc_loss(policy, obs, goals, tokens, actions.ranges)) / 2  # [iRe-VLA Eq. 4]


def main(cfg: Config) -> None:
    tasks, run, policy, reward_model, demos = setup.baseline(cfg, cfg.tasks, "irevla")
    if run.done:
        return
    head_only = cfg.explores == "head"
    cfg.epochs = cfg.epochs or (4 if head_only else 1)
    cfg.lr = cfg.lr or (3e-4 if head_only else 1e-4)
    torch.manual_seed(cfg.seed)
    policy = with_action_head(policy)  # π¹, π² := π⁰                                        [iRe-VLA Alg. 1, line 1]
    policy.language_model.sparse = False  # a critic's gradient through the trunk is dense
    critic, found, now = Critic(policy.cfg.width).to(ranks.device()), Successes(), Progress()
    actions = action_tokenizer(**tasks[0].action_tokens)
    explorers = learners(policy, cfg.explores)
    groups = [{"params": explorers, "lr": cfg.lr}, {"params": list(critic.parameters()), "lr": cfg.critic_lr}]
    ppo_optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    sl_optimizer = torch.optim.AdamW(learners(policy, cfg.consolidates), lr=cfg.sl_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(cfg.seed)
    rng = np.random.default_rng(cfg.seed)
    run.track(policy=policy, critic=critic, found=found, ppo=ppo_optimizer, sl=sl_optimizer)
    run.track(generator=generator, rng=rng, progress=now)
    run.start(policy=policy, reward=reward_model)

    for now.task in range(now.task, len(tasks)):  # [iRe-VLA Alg. 1, line 2]
        env, name = tasks[now.task], f"task{now.task + 1}"
        if now.phase == "new":
            critic.renew(cfg.seed + now.task)  # [iRe-VLA Alg. 1, line 4]
            ppo_optimizer.state.clear()
            now.phase, now.steps = "rl", 0
        learners(policy, cfg.explores)
        while now.phase == "rl" and now.steps < cfg.env_steps:  # [iRe-VLA Alg. 1, line 5]
            rollouts, before = [], now.env_steps
            while sum(len(r.tokens) for r in rollouts) < cfg.tuples:
                rollouts.append(collect(policy, env, cfg, now, generator))
            now.steps += now.env_steps - before
            data = Tuples(policy, critic, rollouts, cfg, actions.ranges)
            now.iteration += 1
            alone = now.steps <= cfg.warmup * cfg.tuples or data.successes < cfg.least_successes
            row = {"iteration": now.iteration, "task": now.task + 1, "env_steps": now.env_steps}
            row |= metrics(rollouts, data.returns, 0.0)
            row |= ppo(policy, critic, ppo_optimizer, data, cfg, actions.ranges, generator, alone)
            run.log(now.iteration, row | {"seconds": run.seconds()}, tell=now.iteration % 10 == 0)
            run.checkpoint()
        if now.phase == "rl":
            run.keep(**{f"{name}_rl": policy})
            rollouts = [collect(policy, env, cfg, now, generator)]
            reached = int(rollouts[0].truth[:, -1].sum())
            while reached < cfg.successes and len(rollouts) * env.num_envs < cfg.attempts:
                rollouts.append(collect(policy, env, cfg, now, generator))
                reached += int(rollouts[-1].truth[:, -1].sum())
            found.add(rollouts, cfg.successes)  # [iRe-VLA Alg. 1, line 6]
            sl_optimizer.state.clear()
            now.phase, now.update = "sl", 0  # π² := π¹: the same weights go on            [iRe-VLA Alg. 1, line 8]
            run.checkpoint()
        learners(policy, cfg.consolidates)
        for update in run.steps(now.update, cfg.sl_updates, f"{name}: supervised"):
            for group in sl_optimizer.param_groups:
                group["lr"] = setup.learning_rate(update, cfg.sl_updates, cfg.sl_lr)
            loss = clone(policy, demos, found, cfg, rng, actions)  # [iRe-VLA Alg. 1, line 9]
            sl_optimizer.zero_grad()
            loss.backward()
            sl_optimizer.step()
            if (update + 1) % 500 == 0:
                now.update = update + 1
                run.checkpoint()
        run.keep(**{f"{name}_sl": policy, "policy": policy})
        now.phase, now.update, now.task = "new", 0, now.task + 1
        run.checkpoint()

    told = {"stage": "irevla", "domain": cfg.tasks[0], "obs": tasks[0].obs, "seed": cfg.seed, "stage1": cfg.stage1}
    told |= {"episodes": now.episodes, "env_steps": now.env_steps}
    run.finish(told, lambda: evaluate(run.folder, cfg.eval_episodes, cfg.seed, tasks[0].success_threshold))


if __name__ == "__main__":
    cli(Config, main)
