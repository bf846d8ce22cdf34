"""RoboFuME (Yang, Sobol Mark et al., 2023, arXiv 2310.15145): offline Q-learning, then practice without resets.

From demonstrations of many tasks and a few of a new one and of its undoing, three things are learnt offline:

    the judge   r̂(o, l), "Is it done: {l}"; yes or no; frozen in practice, where it is the only reward
    the critic  Q(o, l, a) by Cal-QL: Bellman's error, and values of other actions pushed down to V^μ, not below
    the actor   π(a | o, l): climbs Q, and clones the demonstrations

Then it does the task and undoes it in turns. An operator, who is counted, resets a station after a fixed time or when
a block has fallen. An action is L tokens, so Q has a value for each of K numbers at each position, given the tokens
before it: expectations are exact sums. docs/baselines.md counts Algorithm 1's lines. d(o, g) is in an ablation only.

    python baselines/robofume.py --stage1 runs/tabletop,pairs=practice-stage1-s0
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import plumbing  # noqa: E402
from baselines.plumbing import Batch, Counts, Store, act, join, step, to_judge  # noqa: E402
from common import UserError, counting, ranks, setup  # noqa: E402
from common.cli import cli  # noqa: E402
from common.demos import Demonstrations  # noqa: E402
from common.options import Count, Positive, ScaleFlags, Share, Size, Whole, Within  # noqa: E402
from common.weights import load_model  # noqa: E402
from envs.operator import Operator  # noqa: E402
from envs.tabletop import PAIRS, TabletopVectorEnv  # noqa: E402
from model import EFM  # noqa: E402
from rollout import Episodes  # noqa: E402
from tokens import QUESTION_ACTION, Tokenizer, action_tokenizer  # noqa: E402

QUESTION_SUCCESS = "Is it done: {}"
NO, YES = 0, 1  # number tokens
LOOK = 500  # updates between two rows of metrics.csv, offline
NUMBERS = ("state", "after", "tokens", "reward", "v_mu")  # (n, S, d), (n, S, d), (n, L), (n,), (n,)
Q_COLUMNS = ("q_data", "q_policy", "mc_return", "td", "calibration_gap", "bc_nll", "grad_climb", "grad_cloning")
COLUMNS = (*plumbing.JUDGED_COLUMNS, "true_forward", "true_backward", "interventions", *Q_COLUMNS)


@dataclass
class Config(ScaleFlags):
    stage1: str | None = None  # the run whose policy is the actor's start, whose demonstrations are the data
    seed: Whole | None = None  # None: Stage 1's
    reward: Literal["judge", "detector", "truth"] = "judge"  # in practice; d <= s and the truth are not RoboFuME
    calibrate: bool = True  # push values down to V^μ only; without it: CQL
    prior_data: bool = True  # demonstrations of the other tasks
    positives: Count = 1  # the last so many observations of a demonstration are a yes
    failures: Count = 60  # failed episodes of both tasks for the judge, labelled by hand
    judge_updates: Count = 4000
    offline_updates: Count = 4000
    env_steps: Count = 100_000  # of practice, the failures' included
    num_envs: Count = 16  # stations
    reset_least: Positive = 100.0  # seconds between an operator's resets of a station, at least ...
    reset_most: Positive = 100.0  # ... and at most: 1,000 steps
    warmup: Whole = 2000  # steps of practice before its first update
    steps_per_update: Count = 16
    batch: Annotated[int, Within(8)] = 128  # half of it demonstrations, half practice
    gamma: Share = 0.99
    alpha: Size = 0.1  # weight of the conservative term
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
        answer = torch.zeros(len(goals), 1, dtype=torch.long, device=self.device)  # its value is not read
        return self.log_probs(obs, prompts, answer, [(NO, YES + 1)])[0]

    def steps_to_go(self, obs: dict[str, Tensor], goals: list[str], steps: object) -> Tensor:
        """What `rollout` asks a reward model: 0 where the answer is yes, infinite elsewhere. Not a count of steps."""
        log_p = self.log_probs_done(obs, goals)
        return torch.where(log_p[:, YES] > log_p[:, NO], 0.0, torch.inf)


def new_judge(policy: EFM, env: TabletopVectorEnv) -> Judge:
    """From scratch, with the policy's sizes and the question's words: it never learns steps to go."""
    words = [QUESTION_SUCCESS.format(t) for t in env.instructions()] + list(env.state_names)
    sizes = replace(policy.cfg, vocab_size=0, action_head=0, state_mlp=0, state_bias_tokens=0)
    return Judge(sizes, Tokenizer.train(words)).to(ranks.device())


def judge_loss(judge: Judge, batch: Batch) -> Tensor:
    """-log p(done | o, "Is it done: {l}"), averaged; done long (B,), 0 or 1."""
    log_p = judge.log_probs_done({"state": batch["state"].to(judge.device)}, batch["goals"])
    return F.nll_loss(log_p, batch["done"].to(judge.device))


# --- the critic -------------------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """Two values Q_j,i(k) of each number k at each position i, given o, l and the tokens before i."""

    def __init__(self, policy: EFM, numbers: int):
        super().__init__()
        self.trunk = copy.deepcopy(policy)
        self.trunk.language_model.sparse = False  # without the tied logits its embeddings' gradient would be sparse
        self.values = nn.Linear(policy.cfg.width, 2 * numbers)
        for p in self.values.parameters():
            nn.init.zeros_(p)

    def forward(self, obs: dict[str, Tensor], prompts: list[str], tokens: Tensor) -> Tensor:
        """float (B, L, 2, K); tokens long (B, L)."""
        hidden = self.trunk.hidden(obs, prompts, tokens + self.trunk.tokenizer.loc)
        return self.values(hidden).unflatten(-1, (2, -1))


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
    mean = (pi * q).sum(-1)  # (B, L)
    spread = (pi * (q - mean[..., None]).square()).sum(-1).sqrt().mean().detach().clamp(min=0.01)
    return -(mean.sum(1) / spread).mean()  # [RoboFuME L_π]


# --- data -------------------------------------------------------------------------------------------------------------
def practised(r: Episodes, done: Tensor, gamma: float) -> Batch:
    """The episodes' tuples; done bool (n, T + 1) rewards each o'. V^μ = γ^(steps left - 1) where a yes came, else 0."""
    left = torch.from_numpy(r.length)[r.row] - r.t
    v_mu = torch.where(done[r.row, -1], gamma ** (left - 1.0), 0.0)
    numbers = (r.obs["state"].cpu(), plumbing.next_states(r), r.tokens.cpu(), done[r.row, r.t + 1].float(), v_mu)
    return dict(zip(NUMBERS, numbers, strict=True)) | {"goals": list(r.goals)}


def observed(demos: Demonstrations, rows: np.ndarray, positives: int) -> Batch:
    """Observations of demonstrations for the judge: the last `positives` of each are a yes."""
    obs, _, goals, left = demos.batch(rows, torch.device("cpu"))
    return {"state": obs["state"], "goals": goals, "done": (left < positives).long()}


def demonstrated(demos: Demonstrations, rows: np.ndarray, actions, gamma: float) -> Batch:
    """Tuples of demonstrations: r = 1 where the next observation is the final one."""
    obs, action, goals, left = demos.batch(rows, torch.device("cpu"))
    after = demos.observe(demos.index[rows] + 1, torch.device("cpu"))
    numbers = (obs["state"], after["state"], actions.encode(action), (left == 1).float(), gamma ** (left - 1.0))
    return dict(zip(NUMBERS, numbers, strict=True)) | {"goals": goals}


class Station(Operator):
    """The operator of stations that do a task and undo it in turns, beginning with doing after a reset."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        anew = self.env.fallen.any(1) | (self.steps > self.due)
        for i, before in enumerate(self.env.pairs):
            do = anew[i] or before == "backward"
            self.env.pairs[i] = "forward" if do else "backward"  # [RoboFuME Alg. 1, line 15]
        begun = super().reset(seed=seed, options=options)  # [RoboFuME Alg. 1, line 17]
        stuck = self.env.anew & (np.array(self.env.pairs) == "backward")  # nothing to undo: set up anew, and counted
        for i in np.flatnonzero(stuck):
            self.env.pairs[i] = "forward"
        return self.env.ask(stuck) if stuck.any() else begun


# --- learning ---------------------------------------------------------------------------------------------------------
class Learner(nn.Module):
    """Actor, critic and its slowly moving copy, and one update of all three."""

    def __init__(self, actor: EFM, cfg: Config, ranges: list[tuple[int, int]]):
        super().__init__()
        self.actor, self.cfg, self.ranges = actor, cfg, ranges
        self.numbers = max(end for _, end in ranges)
        self.critic = Critic(actor, self.numbers).to(ranks.device())
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=cfg.actor_lr, weight_decay=0)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=cfg.critic_lr, weight_decay=0)

    def log_policy(self, obs: dict, prompts: list[str], tokens: Tensor) -> Tensor:
        """log π_i(k), float (B, L, K), -inf for numbers that are not allowed at position i; tokens long (B, L)."""
        ranges = self.ranges[: tokens.shape[1]]
        each = zip(self.actor.log_probs(obs, prompts, tokens, ranges), ranges, strict=True)
        return torch.stack([F.pad(p, (first, self.numbers - end), value=-torch.inf) for p, (first, end) in each], 1)

    def update(self, batch: Batch, cloned: int, measure: bool) -> dict[str, float]:
        """One step of critic and actor; the first `cloned` tuples are demonstrations. measure: gradient norms, too."""
        cfg = self.cfg
        state, after, tokens, reward, v_mu = (batch[k].to(ranks.device()) for k in NUMBERS)
        obs, obs_next, first = {"state": state}, {"state": after}, tokens[:, :1]  # what it is does not matter
        prompts = [QUESTION_ACTION.format(g) for g in batch["goals"]]

        def of_actor() -> tuple[Tensor, Tensor]:
            return self.log_policy(obs, prompts, tokens), self.log_policy(obs_next, prompts, first)[:, 0].detach()

        def of_critics() -> tuple[Tensor, Tensor, Tensor]:
            q_next = self.target(obs_next, prompts, first)[:, 0]
            return self.critic(obs, prompts, tokens), self.target(obs, prompts, tokens), q_next

        (log_pi, log_pi_next), (q, q_slow, q_next) = ranks.side_by_side(of_actor, of_critics)  # a core each
        pi = log_pi.exp()
        y = targets(q_slow, pi.detach(), q_next, log_pi_next.exp(), reward, cfg.gamma)
        floor = v_mu if cfg.calibrate else torch.full_like(v_mu, -torch.inf)
        bellman, conservative = critic_loss(q, tokens, y, pi.detach(), floor, cfg.alpha)
        nll = -log_pi[:cloned].gather(2, tokens[:cloned, :, None]).sum((1, 2)).mean()
        terms = cfg.eta * actor_climb(pi, q), cfg.bc_weight * nll
        norms = [plumbing.grad_norm(term, self.actor) if measure else math.nan for term in terms]
        ranks.side_by_side(
            lambda: step(self.critic_optimizer, bellman + conservative, self.critic),
            lambda: step(self.actor_optimizer, sum(terms), self.actor),
        )
        for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast.detach(), cfg.target_rate)
        least = q.detach().amin(2)  # (B, L, K)
        q_data, q_policy = least.gather(2, tokens[..., None]).mean(), (pi.detach() * least).sum(-1).mean()
        told = torch.stack([q_data, q_policy, v_mu.mean(), bellman, q_data - v_mu.mean(), nll]).tolist()
        return dict(zip(Q_COLUMNS, told + norms, strict=True))


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
@dataclass
class Progress(Counts):
    """What a run continues from, beside the weights."""

    judge_update: int = 0
    judge_best: float = math.inf  # loss on held-out demonstrations
    updates: int = 0  # of actor and critic
    labels: int = 0  # episodes that a person looked at, for D_⊖


def train_judge(judge, data, halves, failed: Store, run, now: Progress, cfg: Config, rng, optimizer) -> None:
    """Teach r̂ on both halves of the demonstrations and on failures; the best on held-out demonstrations is kept."""
    (train, valid), n = data, 7 * cfg.batch // 16  # n of either half; an eighth is left for the failures
    held_out = observed(valid, np.random.default_rng(0).integers(len(valid.index), size=2048), cfg.positives)
    for update in run.steps(now.judge_update, cfg.judge_updates, "judge"):
        rows = [to_judge(train, half, n, cfg.positives, rng) for half in halves]
        batch = join(observed(train, np.concatenate(rows), cfg.positives), failed.batch(cfg.batch - 2 * n, rng))
        optimizer.param_groups[0]["lr"] = setup.learning_rate(update, cfg.judge_updates, cfg.judge_lr)
        step(optimizer, judge_loss(judge, batch), judge)
        if (update + 1) % LOOK == 0 or update + 1 == cfg.judge_updates:
            now.judge_update = update + 1
            with torch.no_grad():
                loss = judge_loss(judge, held_out).item()
            if loss < now.judge_best:
                now.judge_best = loss
                run.keep(judge=judge)
            run.checkpoint()


def main(cfg: Config) -> None:
    (env,), run, actor, reward_model, (train, valid) = setup.baseline(cfg, ("tabletop,pairs=both",), "robofume")
    if run.done:
        return
    of_pairs = plumbing.rows_of_pairs(train, [*PAIRS["forward"], *PAIRS["backward"]])  # D_f and D_b
    if not len(of_pairs):
        raise UserError(f"--stage1 {cfg.stage1}: has no demonstration of the task; name a run with pairs=practice")
    halves = (train.acted if cfg.prior_data else of_pairs, of_pairs)  # what demonstrations are drawn from
    torch.manual_seed(cfg.seed)
    actions = action_tokenizer(**env.action_tokens)
    judge, learner = new_judge(actor, env), Learner(actor, cfg, actions.ranges)
    judge_optimizer = torch.optim.AdamW(judge.parameters(), lr=cfg.judge_lr, weight_decay=0.01)
    stations = Station(env, cfg.seed, every=(cfg.reset_least, cfg.reset_most))
    failed, replay, now = Store(), Store(), Progress()
    rng, generator = np.random.default_rng(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    run.track(judge=judge, judge_optimizer=judge_optimizer, stations=stations, learner=learner)
    run.track(actor_optimizer=learner.actor_optimizer, critic_optimizer=learner.critic_optimizer)
    run.track(failed=failed, replay=replay, rng=rng, generator=generator, progress=now)
    run.start(policy=actor, reward=reward_model)

    def demonstrations(n: int) -> Batch:
        rows = [rng.choice(halves[0], n - n // 2), rng.choice(halves[1], n // 2)]
        return demonstrated(train, np.concatenate(rows), actions, cfg.gamma)

    def log(row: dict[str, float], tell: bool) -> None:
        plumbing.log(run, now, COLUMNS, row, tell, {"policy": actor}, updates=now.updates)

    if not len(failed):  # D_⊖, half of it of doing, half of undoing the task
        env.pairs = [("forward", "backward")[i % 2] for i in range(env.num_envs)]
        failed.add(plumbing.failures(actor, env, cfg, now, generator))
        now.labels = now.episodes
    train_judge(judge, (train, valid), halves, failed, run, now, cfg, rng, judge_optimizer)  # [RoboFuME Alg. 1, line 4]
    judge.load_state_dict(load_model(run.folder / "judge.safetensors").state_dict())
    judge.requires_grad_(False)
    for update in run.steps(now.updates, cfg.offline_updates, "offline"):  # [RoboFuME Alg. 1, line 6]
        last = (update + 1) % LOOK == 0 or update + 1 == cfg.offline_updates
        told = learner.update(demonstrations(cfg.batch), cfg.batch, last)
        if last:
            now.updates = update + 1
            log(told, tell=True)
    if not len(replay):
        run.keep(offline=actor)
    rewarder, s = judge, 0.0  # no steps are left where the judge says yes
    if cfg.reward == "detector":
        rewarder, s = reward_model, setup.measured_threshold(Path(cfg.stage1), env)

    def ends(d: Tensor, truth: Tensor) -> Tensor:
        return truth if cfg.reward == "truth" else d <= s

    while now.env_steps < cfg.env_steps:  # [RoboFuME Alg. 1, line 9]
        before = now.env_steps
        r = act(actor, rewarder, stations, cfg, now, generator, ends)  # [RoboFuME Alg. 1, line 10]
        stations.steps += r.length
        new = practised(r, ends(r.d, r.truth), cfg.gamma)
        replay.add(new)  # [RoboFuME Alg. 1, line 11]
        updates = now.env_steps // cfg.steps_per_update - before // cfg.steps_per_update
        row, cloned = {}, cfg.batch // 2
        for i in range(updates if len(replay) > cfg.warmup else 0):  # [RoboFuME Alg. 1, line 12]
            batch = join(demonstrations(cloned), replay.batch(cfg.batch - cloned, rng))
            row = learner.update(batch, cloned, i + 1 == updates)
            now.updates += 1
        row |= counting.metrics([r], new["v_mu"], s) | plumbing.per_state(r, s)
        row |= plumbing.per_task(r, env.pairs, ("forward", "backward"))
        log(row | {"interventions": stations.interventions}, tell=now.row % 10 == 0)

    told = {"labels": now.labels, "interventions": stations.interventions, "judge_held_out_loss": now.judge_best}
    plumbing.finish(run, cfg, now, env, "robofume", **told)


if __name__ == "__main__":
    cli(Config, main)
