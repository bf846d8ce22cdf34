"""Stage 2, online self-improvement (Section 3.2, Algorithm 1): the policy practises alone.

The frozen Stage 1 model says how many steps are left, d(o, g), and that is all the supervision there is:

    r(o_t, a_t, o_t+1, g) = d(o_t, g) - d(o_t+1, g)      reward, Eq. 2
    success(o, g)         = 1[d(o, g) <= s]              ends an episode

REINFORCE on Monte Carlo returns improves the policy. The domain's ground truth is logged, and learnt from
only where `--success-bonus` says so: on Aloha, as in the paper.

With V = -d, minus the demonstrator's steps to go, Equation 3 (Appendix E) says what this rewards:

    r_t = (1 - γ) V(o_t+1) + [γ V(o_t+1) - V(o_t)]                            the bracket is reward shaping
    R_t = (1 - γ) Σ_{i>=t} γ^(i-t) V(o_i+1) + γ^(T-t+1) V(o_T+1) - V(o_t)     -V(o_t) is a baseline

The paper leaves out the middle term of R_t: 0 where an episode ends in its goal, and not where time runs out.

    python stage2.py                                    # from the newest Stage 1 run, 1 minute of one core
    python stage2.py --stage1 runs/pointmass-stage1-s1  # a given one
    python stage2.py --success ground-truth --gamma 0   # an ablation
    python stage2.py --domain tabletop,look=real        # practice where the demonstrations were not
    torchrun --nproc_per_node 2 stage2.py               # two processes, half of the simulations each
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, ranks, setup
from common.cli import cli
from common.counting import evaluate, first_look, metrics, pooled_mean
from common.options import Count, Positive, ScaleFlags, Share, Size, Whole
from model import EFM
from rollout import Buffer, Episodes, rollout
from tokens import action_tokenizer


@dataclass
class Config(ScaleFlags):
    """None means: what the domain takes (`stage2_defaults`), else what is said behind it."""

    stage1: str | None = None  # whose policy practises and whose d rewards; None: the newest Stage 1 run
    reward_run: str | None = None  # another Stage 1 run whose reward model judges (Figure 4's ablation)
    domain: str | None = None  # practise in another domain, as in Real2Sim; None: Stage 1's
    seed: Whole | None = None  # rollouts and batches; None: Stage 1's
    gamma: Share | None = None  # discount of the Monte Carlo returns; 0.9
    c: Positive = 0.05  # scale of the REINFORCE loss
    success_threshold: Size | None = None  # s: the detector fires when d(o, g) <= s; as Stage 1 measured
    success: Literal["detector", "ground-truth"] = "detector"  # what ends a practice episode
    temperature: Positive | None = None  # the practising policy is softmax(scores / temperature); 1
    clip_reward: Size | None = None  # rewards are cut off at -this and +this; 0: nowhere
    success_bonus: Size | None = None  # added to the last reward on ground-truth success; 0
    updates: Count = 16  # N, optimiser steps per iteration
    batch: Count | None = None  # B, tuples per optimiser step; 64
    lr: Positive | None = None  # AdamW; 1e-4
    learns: Literal["all", "blocks"] | None = None  # all but the vision tower, or the blocks alone; all
    symmetries: bool | None = None  # transform tuples by them; from states of the pointmass, if Stage 1 did
    keep_optimizer: bool = False  # go on with Stage 1's last AdamW moments, as the authors' notebook does
    num_envs: Count | None = None  # simulations at once, at most; 128, of an operator's stations 16
    first_look: Count = 200  # practice episodes of Stage 1's own policy, to be beaten beyond noise
    operator: bool = False  # practise without resets, but for an operator's: as on the paper's robots
    iterations: Count | None = None  # of Algorithm 1's loop, at most
    patience: Count = 100  # stop after so many iterations without a better policy


# --- the equations ------------------------------------------------------------------------------------------
def rewards(d: Tensor) -> Tensor:
    """r_t = d(o_t, g) - d(o_t+1, g): float (n, T + 1) -> (n, T), the last step included."""
    return d[:, :-1] - d[:, 1:]  # [Eq. 2]


def monte_carlo_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{i>=t} γ^(i-t) r_i, float (n, T) -> (n, T); rewards after an episode's end must be 0."""
    returns = reward.clone()
    for t in reversed(range(reward.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]  # [Alg. 1, line 4]
    return returns


def practice_returns(episodes: Episodes, cfg: Config) -> Tensor:
    """R of practice episodes, float (n, T), from Eq. 2's rewards; on Aloha cut off and with a bonus."""
    reward = rewards(episodes.d)
    if cfg.clip_reward:  # a leap of d is its error more often than the policy's merit
        reward = reward.clamp(-cfg.clip_reward, cfg.clip_reward)
    last = episodes.length - 1
    reward[range(len(last)), last] += (
        cfg.success_bonus * episodes.truth[:, -1]
    )  # paid on the last step of a true success
    return monte_carlo_returns(reward, cfg.gamma)


def reinforce_loss(log_prob: Tensor, returns: Tensor, c: float) -> Tensor:
    """-c · R_t · log p(a_t | o_t, Question_action(g)), averaged; log_prob, returns float (B,)."""
    return -(c * returns * log_prob).mean()  # [Alg. 1, line 7]


def detect_success(d: Tensor, s: float) -> Tensor:
    """success(o, g) = 1[d(o, g) <= s], bool like d (Section 3.2)."""
    return d <= s


# --- Algorithm 1 --------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run continues from, beside the weights. Steps: the length of an episode, which d <= s ends."""

    iteration: int = 0
    env_steps: int = 0
    episodes: int = 0
    # of each of the last five iterations: episodes, mean steps, variance
    recent: list[list[float]] = field(default_factory=list)
    # Stage 1's own policy in practice: mean steps, standard error
    first: list[float] = field(default_factory=list)
    best: float = math.inf  # mean steps of the policy that is kept
    best_at: int = 0  # iteration

    def expected_steps(self, horizon: int) -> float:
        """Of a practice episode, as far as is known."""
        if self.recent:
            return self.recent[-1][1]
        return self.first[0] if self.first else horizon

    def better(self, length: np.ndarray) -> bool:
        """Are the last five iterations 1 % faster than ever, and 3 standard errors than Stage 1's policy?"""
        self.recent = [*self.recent, [len(length), float(length.mean()), float(length.var())]][-5:]
        mean, error = pooled_mean(self.recent)
        beyond_noise = self.first[0] - mean > 3 * math.hypot(error, self.first[1])
        if len(self.recent) < 5 or mean >= 0.99 * self.best or not beyond_noise:
            return False
        self.best, self.best_at = mean, self.iteration
        return True


def main(cfg: Config) -> None:
    env, run, policy, reward_model, optimizer, wrapped = setup.stage2(cfg)
    if run.done:
        return
    actions = action_tokenizer(**env.action_tokens)
    generator = torch.Generator().manual_seed(cfg.seed)
    now = Progress()
    run.track(optimizer=optimizer, generator=generator, progress=now, operator=env if cfg.operator else None)
    run.start(policy=policy, reward=reward_model)  # until practice finds a better policy

    def ends(d: Tensor, truth: Tensor) -> Tensor:
        return detect_success(d, cfg.success_threshold) if cfg.success == "detector" else truth

    def practise(tuples: int) -> Episodes:
        """A whole episode of the present policy in about as many simulations as so many tuples take."""
        most = cfg.num_envs // ranks.world()
        needed = 8 * math.ceil(tuples / now.expected_steps(env.horizon) / 8)  # in eights
        stations = setup.simulations(env, min(most, needed))
        seed = 10**9 * (cfg.seed + 1) + now.episodes + ranks.rank() * stations.num_envs
        with ranks.unsharded(policy, reward_model), ranks.autocast(cfg.bf16):
            episodes = rollout(policy, reward_model, stations, seed, generator, ends, cfg.temperature)
        if cfg.operator:
            env.steps += episodes.length
        now.episodes += stations.num_envs * ranks.world()
        return episodes

    if not now.first:  # how Stage 1's own policy does, as practice will see it
        looks = [practise(cfg.first_look * env.horizon)]
        while sum(len(r.length) for r in looks) * ranks.world() < cfg.first_look:
            looks.append(practise(cfg.first_look * env.horizon))
        now.first = first_look(looks, cfg.success_threshold)
        now.env_steps = sum(ranks.all_gather(sum(int(r.length.sum()) for r in looks)))
    size = cfg.batch // ranks.world()  # of this process's part of a batch
    n = cfg.updates * size  # tuples of an iteration
    for iteration in run.steps(now.iteration, cfg.iterations, "stage 2"):  # [Alg. 1, line 1]
        if iteration - now.best_at > cfg.patience:
            tqdm.write(f"no better policy for {cfg.patience} iterations: a plateau")
            break
        rollouts, buffer = [], Buffer(env.symmetries if cfg.symmetries else None, actions)
        if ranks.rank():  # the first rank's generator is in the checkpoint, the others' need not be
            generator.manual_seed(10**9 * (cfg.seed + 1) + 10**4 * iteration + ranks.rank())
        while (placed := min(ranks.all_gather(len(buffer)))) < n:
            episodes = practise(n - placed)  # [Alg. 1, line 2]
            buffer.place(episodes, practice_returns(episodes, cfg))  # [Alg. 1, line 5]
            rollouts.append(episodes)
        for obs, prompts, tokens, returns in buffer.batches(n, size, generator):  # [Alg. 1, line 8]
            with ranks.autocast(cfg.bf16):
                log_prob = wrapped(EFM.log_prob, obs, prompts, tokens, actions.ranges, cfg.temperature)
            loss = reinforce_loss(log_prob, returns, cfg.c)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = ranks.full_state(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
            optimizer.step()

        now.env_steps += sum(ranks.all_gather(len(buffer)))
        row = {"iteration": iteration + 1, "env_steps": now.env_steps, "episodes": now.episodes}
        row |= metrics(rollouts, buffer.returns(), cfg.success_threshold)
        row |= {"grad_norm": grad_norm.item(), "seconds": run.seconds()}
        if cfg.operator:
            row |= {"interventions": env.interventions, "robot_hours": env.hours(now.env_steps)}
        run.log(iteration + 1, row, tell=iteration % 10 == 9)
        if not all(map(math.isfinite, row.values())):
            raise UserError(f"--lr {cfg.lr}: the policy's numbers are none any more; take a smaller one")
        better = now.better(*ranks.concat_ranks(np.concatenate([r.length for r in rollouts])))
        now.iteration = iteration + 1
        if better:
            run.keep(policy=policy)
        run.checkpoint()

    told = {"stage": "stage2", "domain": cfg.domain, "obs": env.obs, "seed": cfg.seed, "stage1": cfg.stage1}
    told |= {"episodes": now.episodes, "env_steps": now.env_steps}
    told |= {"believed_steps_before": now.first[0], "believed_steps_after": min(now.first[0], now.best)}
    if now.best == math.inf:
        tqdm.write("no policy was better than Stage 1's beyond noise: Stage 1's is kept")
    run.finish(told, lambda: evaluate(run.folder, cfg.eval_episodes, cfg.seed, cfg.success_threshold))


if __name__ == "__main__":
    cli(Config, main, several=True)
