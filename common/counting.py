"""What is counted: of practice episodes for the log, of fresh ones true success and the detector's mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from rollout import Episodes, rollout

CHUNK = 100  # episodes that are evaluated at once; the first 100 are the same however many there are


# --- of practice ------------------------------------------------------------------------------------------------------
def metrics(rollouts: list[Episodes], returns: Tensor, threshold: float) -> dict[str, float]:
    """What Stage 2 logs of an iteration's episodes and of the returns of their tuples, over all ranks."""
    length = np.concatenate([r.length for r in rollouts])
    detected = np.concatenate([r.d[:, -1].numpy() <= threshold for r in rollouts])
    truth = np.concatenate([r.truth[:, -1].numpy() for r in rollouts])
    entropy = torch.cat([r.entropy for r in rollouts]).cpu()
    length, detected, truth, entropy, returns = ranks.concat_ranks(length, detected, truth, entropy, returns.cpu())
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


# --- of fresh episodes ------------------------------------------------------------------------------------------------
def confusion(detected: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Counts, precision, recall; bool (n,) each: did the detector end it, was the goal truly reached then?

    recall: of the episodes that are in the goal when they end, the share that the detector ended. An arrival that no
    alarm ended, and that was left again, is not counted.
    """
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


def evaluate(folder: Path, episodes: int, seed: int, s: float, policy: str = "policy", **how: Any) -> dict[str, float]:
    """A run's true success, and its detector's confusion in practice.

    s: the detector's threshold; policy: which of the run's checkpoints acts; how: `rollout`'s temperature, by
    default the domain's, and greedy.
    """
    env, actor, judge = load_run(folder, 1, policy)
    how = {"temperature": env.temperature} | how
    seed = 5 * 10**8 + seed * 10**6  # not those of demonstrations or of practice
    summary = {"temperature": how["temperature"], "success_threshold": s}
    success, detector = ranks.side_by_side(
        lambda: true_success(actor, env, episodes, seed, judge, s, **how),
        lambda: detector_confusion(actor, judge, env, episodes, seed + 5 * 10**5, s, **how),
    )
    return summary | success | detector
