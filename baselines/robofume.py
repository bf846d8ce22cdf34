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
from dataclasses import dataclass, replace
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
from common.weights import load_model  # noqa: E402
from envs import tabletop  # noqa: E402
from envs.operator import Operator  # noqa: E402
from envs.tabletop_language import Meaning, texts  # noqa: E402
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
    words = [QUESTION_SUCCESS.format(t) for t in env.instructions()] + list(env.state_names)
    sizes = replace(policy.cfg, vocab_size=0, action_head=0)
    return Judge(sizes, Tokenizer.train(words)).to(ranks.device())


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
    """Tuples (o, l, a, r, o', V^μ) of practice, one tensor each."""

    def __init__(self):
        self.columns: dict[str, Tensor] = {}
        self.goals: list[str] = []

    def add(self, episodes: Episodes, done: Tensor, gamma: float) -> None:
        """done bool (n, T + 1): what rewards each observation. V^μ = γ^(steps left - 1) where a yes came, else 0."""
        row, t = episodes.row, episodes.t
        place = torch.full(done.shape, -1)
        place[row, t] = torch.arange(len(row))
        following = place[row, t + 1]  # the next tuple, -1 where the episode ends
        new = {"tokens": episodes.tokens, "reward": done[row, t + 1].float()}
        left = torch.from_numpy(episodes.length)[row] - t
        new["v_mu"] = torch.where(done[row, -1], gamma ** (left - 1.0), 0.0)
        for key, value in episodes.obs.items():
            after = value[following]
            after[following < 0] = episodes.last[key][row[following < 0]]
            new[f"obs.{key}"], new[f"after.{key}"] = value, after
        for key, value in new.items():
            self.columns[key] = torch.cat([self.columns[key], value]) if key in self.columns else value
        self.goals += list(episodes.goals)

    def batch(self, n: int, rng: np.random.Generator) -> tuple:
        """(obs, after, goals, tokens, reward, v_mu) of n tuples."""
        i = rng.integers(len(self.goals), size=n)
        obs = {k.removeprefix("obs."): v[i] for k, v in self.columns.items() if k.startswith("obs.")}
        after = {k.removeprefix("after."): v[i] for k, v in self.columns.items() if k.startswith("after.")}
        tokens, reward, v_mu = (self.columns[k][i] for k in ("tokens", "reward", "v_mu"))
        return obs, after, [self.goals[k] for k in i], tokens, reward, v_mu

    def state_dict(self) -> dict:
        return {"columns": self.columns, "goals": self.goals}

    def load_state_dict(self, state: dict) -> None:
        self.columns, self.goals = state["columns"], state["goals"]


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


def join(first: tuple, second: tuple) -> tuple:
    """Two batches of tuples as one."""
    joined = []
    for a, b in zip(first, second, strict=True):
        if isinstance(a, dict):
            joined.append({k: torch.cat([a[k], b[k]]) for k in a})
        else:
            joined.append(a + b if isinstance(a, list) else torch.cat([a, b]))
    return tuple(joined)


# --- learning ---------------------------------------------------------------------------------------------------------
class Learner:
    """Actor, critic and its slowly moving copy, and one update of all three."""

    def __init__(self, actor: EFM, cfg: Config, ranges: list[tuple[int, int]]):
        self.actor, self.cfg, self.ranges = actor, cfg, ranges
        self.numbers = max(end for _, end in ranges)
        self.critic = Critic(actor, self.numbers).to(ranks.device())
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=cfg.actor_lr, weight_decay=0.0)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=cfg.critic_lr, weight_decay=0.0)

    def state_dict(self) -> dict:
        parts = ("actor", "critic", "target", "actor_optimizer", "critic_optimizer")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)

    def policy(self, obs: dict, prompts: list[str], tokens: Tensor) -> Tensor:
        return probabilities(self.actor, obs, prompts, tokens, self.ranges[: tokens.shape[1]], self.numbers)

    def update(self, batch: tuple, demonstrations: int) -> dict[str, float]:
        """One step of critic and actor; the first so many tuples are demonstrations, which are cloned too."""
        cfg = self.cfg
        obs, after, goals, tokens, reward, v_mu = batch
        prompts = [QUESTION_ACTION.format(g) for g in goals]
        with torch.no_grad():
            pi, pi_next = self.policy(obs, prompts, tokens), self.policy(after, prompts, tokens[:, :1])[:, 0]
            q_next = self.target(after, prompts, tokens[:, :1])[:, 0]
            y = targets(self.target(obs, prompts, tokens), pi, q_next, pi_next, reward, cfg.gamma)
        q = self.critic(obs, prompts, tokens)
        floor = v_mu if cfg.calibrate else torch.full_like(v_mu, -torch.inf)
        bellman, conservative = critic_loss(q, tokens, y, pi, floor, cfg.alpha)
        step(self.critic_optimizer, bellman + conservative, self.critic)
        pi = self.policy(obs, prompts, tokens)
        taken = pi.gather(2, tokens[..., None])[..., 0]  # (B, L)
        cloning = -taken[:demonstrations].clamp(min=1e-9).log().sum(1).mean()
        climb = actor_climb(pi, self.target(obs, prompts, tokens))
        step(self.actor_optimizer, cfg.eta * climb + cfg.bc_weight * cloning, self.actor)
        for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast.detach(), cfg.target_rate)
        q_data = q.detach().amin(2).gather(2, tokens[..., None])[..., 0].mean()
        q_policy = (pi * q.amin(2)).detach().sum(-1).mean()
        logged = {"q_data": q_data, "q_policy": q_policy, "mc_return": v_mu.mean(), "td": bellman.detach()}
        logged |= {"calibration_gap": q_data - v_mu.mean(), "bc_nll": cloning.detach(), "climb": climb.detach()}
        return {k: v.item() for k, v in logged.items()}


def step(optimizer: torch.optim.Optimizer, loss: Tensor, model: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run continues from, beside the weights."""

    judge_update: int = 0
    judge_best: float = float("inf")  # loss on held-out demonstrations
    offline_update: int = 0
    round: int = 0
    env_steps: int = 0
    episodes: int = 0


def collect_failures(actor: EFM, env: tabletop.TabletopVectorEnv, cfg: Config, now: Progress, failed: Replay,
                     generator: torch.Generator) -> None:  # fmt: skip
    """D_⊖: observations of episodes of both tasks that fail to the horizon. Ground truth is the person who labels."""
    for task in ("forward", "backward"):
        found = 0
        while found < cfg.failures:
            env.pairs = [task] * env.num_envs
            seed = 10**9 * (cfg.seed + 1) + now.episodes
            r = rollout(actor, None, env, seed, generator, lambda d, truth: truth)
            now.episodes += env.num_envs
            now.env_steps += int(r.length.sum())
            fails = ~r.truth[:, -1] & ((~r.truth[:, -1]).cumsum(0) <= cfg.failures - found)
            mine = fails[r.row]
            r.obs = {k: v[mine] for k, v in r.obs.items()}
            r.tokens, r.goals, r.row, r.t = r.tokens[mine], r.goals[mine.numpy()], r.row[mine], r.t[mine]
            failed.add(r, torch.zeros_like(r.truth), cfg.gamma)
            found += int(fails.sum())


def train_judge(judge: Judge, data: tuple, failed: Replay, run, now: Progress, cfg: Config, rng, optimizer) -> None:
    """Fine-tune r̂ on all data; the best on held-out demonstrations is kept, frozen, for practice."""
    train, valid = data
    fixed = np.random.default_rng(0).integers(len(valid.index), size=2048)

    def on_demonstrations(demos: Demonstrations, rows: np.ndarray) -> tuple:
        obs, _, goals, left = demos.batch(rows, ranks.device())
        return obs, goals, (left < cfg.positives).long()

    for update in run.steps(now.judge_update, cfg.judge_updates, "judge"):
        wrong = cfg.batch // 8
        obs, goals, done = on_demonstrations(train, rng.integers(len(train.index), size=cfg.batch - wrong))
        bad, _, bad_goals, *_ = failed.batch(wrong, rng)
        obs = {k: torch.cat([obs[k], bad[k]]) for k in obs}
        loss = judge_loss(judge, obs, goals + bad_goals, torch.cat([done, torch.zeros(wrong, dtype=torch.long)]))
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate(update, cfg.judge_updates, cfg.judge_lr)
        step(optimizer, loss, judge)
        if (update + 1) % 250 == 0 or update + 1 == cfg.judge_updates:
            with torch.no_grad():
                held_out = judge_loss(judge, *on_demonstrations(valid, fixed)).item()
            if held_out < now.judge_best:
                now.judge_best = held_out
                run.keep(judge=judge)
            now.judge_update = update + 1
            run.checkpoint()


def main(cfg: Config) -> None:
    (env,), run, actor, reward_model, data = setup.baseline(cfg, ("tabletop,pairs=both",), "robofume")
    if run.done:
        return
    torch.manual_seed(cfg.seed)
    actions = action_tokenizer(**env.action_tokens)
    judge = new_judge(actor, env)
    judge_optimizer = torch.optim.AdamW(judge.parameters(), lr=cfg.judge_lr, weight_decay=0.01)
    learner = Learner(actor, cfg, actions.ranges)
    stations = Station(env, cfg.seed, every=(cfg.reset_every, cfg.reset_every))
    failed, replay, now = Replay(), Replay(), Progress()
    rng, generator = np.random.default_rng(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    run.track(judge=judge, judge_optimizer=judge_optimizer, learner=learner, stations=stations)
    run.track(failed=failed, replay=replay, rng=rng, generator=generator, progress=now)
    run.start(policy=actor, reward=reward_model)
    train = data[0]
    pairs = [*tabletop.PAIRS["forward"], *tabletop.PAIRS["backward"]]
    both = {text for a, b in pairs for text in texts(Meaning("block2block", a, b), 4)}
    of_pair = train.acted[np.isin(train.instruction[train.episode[train.acted]], list(both))]  # D_f and D_b
    everything = train.acted if cfg.prior_data else of_pair

    if not failed.goals:
        collect_failures(actor, env, cfg, now, failed, generator)
    train_judge(judge, data, failed, run, now, cfg, rng, judge_optimizer)  # [RoboFuME Alg. 1, line 1]
    judge.load_state_dict(load_model(run.folder / "judge.safetensors").state_dict())
    judge.requires_grad_(False)
    for update in run.steps(now.offline_update, cfg.offline_updates, "offline"):  # [RoboFuME Alg. 1, line 2]
        rows = np.concatenate([rng.choice(everything, cfg.batch // 2), rng.choice(of_pair, cfg.batch // 2)])
        logged = learner.update(demonstrated(train, rows, actions, cfg.gamma), cfg.batch)
        if (update + 1) % 500 == 0 or update + 1 == cfg.offline_updates:
            print("  ".join(f"{k} {v:.4g}" for k, v in logged.items()))
            now.offline_update = update + 1
            run.checkpoint()
    if now.round == 0:
        run.keep(offline=actor)

    while now.env_steps < cfg.env_steps:  # [RoboFuME Alg. 1, line 3]
        seed = 10**9 * (cfg.seed + 1) + now.episodes
        use_truth = cfg.reward == "truth"
        ends = (lambda d, truth: truth) if use_truth else (lambda d, truth: d <= 0)
        r = rollout(actor, judge, stations, seed, generator, ends)  # act and switch  [RoboFuME Alg. 1, line 4]
        stations.steps += r.length
        replay.add(r, r.truth if use_truth else r.d <= 0, cfg.gamma)
        before, now.env_steps = now.env_steps, now.env_steps + int(r.length.sum())
        now.episodes += env.num_envs
        now.round += 1
        logged = {}
        if len(replay.goals) > cfg.warmup:
            for _ in range((now.env_steps - before) // cfg.steps_per_update):
                quarter = cfg.batch // 4
                rows = np.concatenate([rng.choice(everything, quarter), rng.choice(of_pair, quarter)])
                batch = join(demonstrated(train, rows, actions, cfg.gamma), replay.batch(cfg.batch - 2 * quarter, rng))
                logged = learner.update(batch, 2 * quarter)
        forward = np.array([pair == "forward" for pair in env.pairs])
        truth = r.truth[:, -1].numpy()
        row = {"iteration": now.round, "env_steps": now.env_steps, "episodes": now.episodes}
        row |= metrics([r], replay.columns["v_mu"][-len(r.tokens) :], 0.0) | per_state(r)
        row |= {"success_forward": truth[forward].mean() if forward.any() else 0.0}
        row |= {"success_backward": truth[~forward].mean() if (~forward).any() else 0.0}
        row |= {"interventions": stations.interventions}
        empty = ("q_data", "q_policy", "mc_return", "td", "calibration_gap", "bc_nll", "climb")
        row |= dict.fromkeys(empty, float("nan")) | logged | {"seconds": run.seconds()}
        run.log(now.round, row, tell=now.round % 10 == 0)
        if now.env_steps // 25_000 > before // 25_000:
            run.keep(**{f"steps{now.env_steps // 25_000 * 25}k": actor})
        run.keep(policy=actor)
        run.checkpoint()

    told = {"stage": "robofume", "domain": env.name, "obs": env.obs, "seed": cfg.seed, "stage1": cfg.stage1}
    told |= {"episodes": now.episodes, "env_steps": now.env_steps, "interventions": stations.interventions}
    run.finish(told, lambda: evaluate(run.folder, cfg.eval_episodes, cfg.seed, env.success_threshold))


if __name__ == "__main__":
    cli(Config, main)
