"""Rollouts: a policy acts in many simulations at once, the frozen reward model watches; both are counted.

No rule for success is here: `ends(d, truth)` is handed in, and says which episodes are over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from common import ranks
from common.runs import wilson
from common.setup import load_run, make_env
from model import EFM
from tokens import QUESTION_ACTION, StepsToGo, action_tokenizer

CHUNK = 100  # episodes that are evaluated at once; the first 100 are the same however many there are


@dataclass
class Episodes:
    """One episode of each of n simulations: M tuples (o, a, g) in all, and what was seen of each simulation.

    d and truth are frozen at an episode's end, so their last column is the end of every episode.
    """

    obs: dict[str, Tensor]  # (M, ...), as the policy takes them: images as features
    tokens: Tensor  # long (M, L), the action
    goals: np.ndarray  # text (M,)
    entropy: Tensor  # float (M,), of the whole action, in nats
    row: Tensor  # long (M,), the simulation
    t: Tensor  # long (M,), the time
    last: dict[str, Tensor]  # (n, ...), each simulation's final observation
    d: Tensor  # float (n, T + 1), of every observation; infinite without a reward model
    truth: Tensor  # bool (n, T + 1), true success of every observation
    length: np.ndarray  # int (n,), steps


def encode_observation(
    model: EFM, obs: dict[str, np.ndarray], rows: np.ndarray, before: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's input for the simulations `rows` of a domain's observation, images encoded.

    Each frame passes through the ViT once: the previous frame's features come from `before`, the last step's
    input, or None where there is none, at first and in a domain with two views of the same moment.
    """
    device = model.language_model.embed_tokens.weight.device
    if "state" in obs:
        state = torch.from_numpy(obs["state"][rows]).to(device)
        return {"state": state.unflatten(1, (-1, model.cfg.state_dim))}  # (B, S, d)
    encoded = {}
    if "joints" in obs:
        encoded["joints"] = torch.from_numpy(obs["joints"][rows]).to(device)
    frames = torch.from_numpy(obs["images"][rows]).to(device)  # (B, 2, H, W, 3)
    if before is None:
        encoded["features"] = model.encode_images(frames)  # (B, 2, N, Dv)
    else:
        encoded["features"] = torch.cat([before["features"][:, 1:], model.encode_images(frames[:, 1:])], 1)
    return encoded


@torch.no_grad()
def rollout(
    policy: EFM,
    reward_model: EFM | None,
    env: VectorEnv,
    seed: int,
    generator: torch.Generator,
    ends: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    greedy: bool = False,
    keep: bool = True,
    watch: Callable[[], None] = lambda: None,
) -> Episodes:
    """One episode in each of the n simulations, until `ends` or the horizon.

    ends: (d float (B,), truth bool (B,)) of the present observations -> bool (B,): which episodes are over.
    keep: whether to keep the observations, which an evaluation does not need.
    watch: called after the reset and after each step.
    """
    actions = action_tokenizer(**env.action_tokens)
    steps = StepsToGo(env.steps_cap, env.steps_bins)

    def judge(encoded: dict[str, Tensor], goals: np.ndarray) -> Tensor:
        if reward_model is None:
            return torch.full((len(goals),), math.inf)
        return reward_model.steps_to_go(encoded, goals.tolist(), steps).cpu()

    n, alive = env.num_envs, np.arange(env.num_envs)  # alive: the simulations whose episode goes on
    obs, info = env.reset(seed=seed)
    goals = np.array(obs["instruction"], dtype=object)
    policy_input = encode_observation(policy, obs, alive)
    reward_input = encode_observation(reward_model, obs, alive) if reward_model else {}
    d = [judge(reward_input, goals)]
    truth = [torch.from_numpy(info["is_success"].copy())]
    length, tuples, ended = np.zeros(n, int), [], []
    watch()
    for t in range(env.horizon):
        prompts = [QUESTION_ACTION.format(g) for g in goals[alive]]
        tokens, entropy = policy.sample(policy_input, prompts, actions.ranges, generator, greedy, temperature)
        time = torch.full((len(alive),), t)
        kept = policy_input if keep else {}
        tuples.append((kept, tokens, goals[alive], entropy.sum(1), torch.from_numpy(alive), time))
        action = np.zeros(env.action_space.shape, np.float32)
        action[alive] = actions.decode(tokens.cpu()).numpy()
        obs, _, _, _, info = env.step(action)
        watch()
        if env.simultaneous:
            policy_input = reward_input = None  # no frame comes again
        policy_input = encode_observation(policy, obs, alive, policy_input)
        reward_input = encode_observation(reward_model, obs, alive, reward_input) if reward_model else {}
        d_now = judge(reward_input, goals[alive])
        truth_now = torch.from_numpy(info["is_success"][alive])
        d.append(d[-1].clone())
        truth.append(truth[-1].clone())
        d[-1][alive] = d_now
        truth[-1][alive] = truth_now
        length[alive] = t + 1
        over = ends(d_now, truth_now) | (t + 1 == env.horizon)
        if keep:
            ended.append((torch.from_numpy(alive)[over], {k: v[over] for k, v in policy_input.items()}))
        alive = alive[~over.numpy()]
        if len(alive) == 0:
            break
        policy_input = {k: v[~over] for k, v in policy_input.items()}
        reward_input = {k: v[~over] for k, v in reward_input.items()}
    kept, tokens, texts, entropy, row, time = zip(*tuples, strict=True)
    obs = {k: torch.cat([o[k] for o in kept]) for k in kept[0]}
    last = {}
    if keep:
        order = torch.cat([rows for rows, _ in ended]).argsort()
        last = {k: torch.cat([final[k] for _, final in ended])[order] for k in obs}
    tokens, texts, entropy = torch.cat(tokens), np.concatenate(texts), torch.cat(entropy)
    row, time, d, truth = torch.cat(row), torch.cat(time), torch.stack(d, 1), torch.stack(truth, 1)
    return Episodes(obs, tokens, texts, entropy, row, time, last, d, truth, length)


class Buffer:
    """The tuples (o, a, g, R) of one iteration."""

    def __init__(self):
        self.placed: list[tuple] = []

    def place(self, episodes: Episodes, returns: Tensor) -> None:
        """Put every tuple of the episodes in, with its return; returns float (n, T)."""
        of_tuples = returns[episodes.row, episodes.t].to(episodes.tokens.device)  # (M,)
        self.placed.append((episodes.obs, episodes.tokens, episodes.goals, of_tuples))

    def __len__(self) -> int:
        return sum(len(tokens) for _, tokens, _, _ in self.placed)

    def returns(self) -> Tensor:
        return torch.cat([returns for _, _, _, returns in self.placed])

    def batches(self, n: int, size: int, generator: torch.Generator) -> Iterator[tuple]:
        """(obs, prompts, tokens, returns) of n tuples, `size` at a time, none twice; the rest is dropped."""
        obs, tokens, goals, returns = zip(*self.placed, strict=True)
        obs = {k: torch.cat([o[k] for o in obs]) for k in obs[0]}
        tokens, goals, returns = torch.cat(tokens), np.concatenate(goals), torch.cat(returns)
        for i in torch.randperm(len(self), generator=generator)[:n].split(size):
            prompts = [QUESTION_ACTION.format(g) for g in goals[i.numpy()]]
            i = i.to(tokens.device)
            yield {k: v[i] for k, v in obs.items()}, prompts, tokens[i], returns[i]


# --- counting -----------------------------------------------------------------------------------------------
def metrics(rollouts: list[Episodes], returns: Tensor, threshold: float) -> dict[str, float]:
    """What Stage 2 logs of an iteration's episodes and of the returns of their tuples, over all ranks."""
    length = np.concatenate([r.length for r in rollouts])
    detected = np.concatenate([r.d[:, -1].numpy() <= threshold for r in rollouts])
    truth = np.concatenate([r.truth[:, -1].numpy() for r in rollouts])
    entropy = torch.cat([r.entropy for r in rollouts]).cpu()
    length, detected, truth, entropy, returns = ranks.concat_ranks(
        length, detected, truth, entropy, returns.cpu()
    )
    return {
        "true_at_end": float(truth.mean()),
        "detected": float(detected.mean()),
        "false_positives": float((detected & ~truth).mean()),
        "mean_steps": float(length.mean()),
        "return_mean": returns.mean().item(),
        "return_std": returns.std().item() if len(returns) > 1 else 0.0,
        "return_negative": (returns < 0).float().mean().item(),
        "entropy": entropy.mean().item(),
    }


def pooled_mean(parts: list[list[float]]) -> list[float]:
    """[mean, its standard error] of what has been counted in parts (number, mean, variance)."""
    n, mean, variance = np.array(parts).T
    pooled = float((n * mean).sum() / n.sum())
    spread = float((n * (variance + (mean - pooled) ** 2)).sum() / n.sum())
    return [pooled, math.sqrt(spread / n.sum())]


def first_look(looks: list[Episodes], threshold: float) -> list[float]:
    """How Stage 1's own policy does in practice, as the model sees it: [mean steps, standard error]."""
    length = np.concatenate([r.length for r in looks])
    length, d = ranks.concat_ranks(length, torch.cat([r.d[:, -1] for r in looks]))
    steps = pooled_mean([[len(length), float(length.mean()), float(length.var())]])
    share = (d <= threshold).float().mean().item()
    print(f"the detector fires in {share:.0%} of Stage 1's own episodes; they take {steps[0]:.1f} steps")
    if share < 0.2:
        print("that is too few to learn from: take more demonstrations, or a larger --success-threshold")
    return steps


def confusion(detected: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Counts, precision, recall; bool (n,) each: did the detector end it, was the goal truly reached then?"""
    table = {
        "true_positives": int((detected & truth).sum()),
        "false_positives": int((detected & ~truth).sum()),
        "false_negatives": int((~detected & truth).sum()),
        "true_negatives": int((~detected & ~truth).sum()),
    }
    table["precision"] = table["true_positives"] / max(1, int(detected.sum()))
    table["recall"] = table["true_positives"] / max(1, int(truth.sum()))
    return table


def confirmed_detections(d: np.ndarray, truth: np.ndarray, threshold: float) -> list[bool]:
    """Of each episode with a detection: does true success follow within s steps, which is what d <= s claims?

    d float, truth bool (n, T + 1), frozen at the end.
    """
    confirmed = []
    for i in np.flatnonzero((d <= threshold).any(1)):
        first = int((d[i] <= threshold).argmax())
        confirmed.append(bool(truth[i, first : first + math.ceil(threshold) + 1].any()))
    return confirmed


def chunks(env: VectorEnv, episodes: int, seed: int) -> Iterator[tuple[VectorEnv, int, torch.Generator]]:
    """(the domain with at most CHUNK simulations, the seed of their episodes, a generator), part by part."""
    for first in range(0, episodes, CHUNK):
        part = make_env(env.name, min(CHUNK, episodes - first), obs=env.obs)
        yield part, seed + first, torch.Generator().manual_seed(10**6 * first + seed)


def true_success(
    policy: EFM,
    env: VectorEnv,
    episodes: int,
    seed: int,
    judge: EFM | None = None,
    s: float = 0.0,
    **how: Any,
) -> dict[str, float]:
    """Success, with its 95 % interval, and steps of episodes that end in true success or at the horizon.

    judge: with a reward model and its s, also the share of first detections that come true within s steps.
    """
    reached, steps, confirmed = 0, 0, []
    for part, first, generator in chunks(env, episodes, seed):
        r = rollout(policy, judge, part, first, generator, lambda d, truth: truth, keep=False, **how)
        reached += int(r.truth[:, -1].sum())
        steps += int(r.length.sum())
        confirmed += confirmed_detections(r.d.numpy(), r.truth.numpy(), s)
    low, high = wilson(reached, episodes)
    counted = {"success": reached / episodes, "success_low": low, "success_high": high}
    counted |= {"mean_steps": steps / episodes, "eval_episodes": episodes}
    if judge is not None:
        counted["confirmed_detections"] = float(np.mean(confirmed)) if confirmed else 0.0
    return counted


def detector_confusion(
    policy: EFM, judge: EFM, env: VectorEnv, episodes: int, seed: int, s: float, **how: Any
) -> dict[str, float]:
    """The detector's counts over episodes that it ends itself, as in practice."""
    detected, truth = [], []
    for part, first, generator in chunks(env, episodes, seed):
        r = rollout(policy, judge, part, first, generator, lambda d, truth: d <= s, keep=False, **how)
        detected.append(r.d[:, -1].numpy() <= s)
        truth.append(r.truth[:, -1].numpy())
    return confusion(np.concatenate(detected), np.concatenate(truth))


def evaluate(
    folder: Path, episodes: int, seed: int, s: float, policy: str = "policy", **how: Any
) -> dict[str, float]:
    """A run's true success, and its detector's confusion in practice.

    s: the detector's threshold; policy: which of the run's checkpoints acts; how: `rollout`'s temperature, by
    default the domain's, and greedy.
    """
    env, actor, judge = load_run(folder, 1, policy)
    how = {"temperature": env.temperature} | how
    seed = 5 * 10**8 + seed * 10**6  # not those of demonstrations or of practice
    summary = {"temperature": how["temperature"], "success_threshold": s}
    summary |= true_success(actor, env, episodes, seed, judge, s, **how)
    return summary | detector_confusion(actor, judge, env, episodes, seed + 5 * 10**5, s, **how)
