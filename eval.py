"""Evaluation: true success with intervals, the detector's confusion table, videos, steps-to-go traces, figures.

    python eval.py                                      # the newest run
    python eval.py --run runs/pointmass-stage2-s0 --episodes 1000
    python eval.py --run runs/pointmass-stage1-s0 --greedy
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import envs
from common import UserError, wilson
from stage2 import rollout


@dataclass
class Config:
    run: str = ""  # folder of a Stage 1 or Stage 2 run; empty: the newest finished one
    episodes: int = 500  # evaluation episodes
    seed: int = 0  # of the episodes and the sampled actions
    s: float = 3.0  # the detector's threshold
    greedy: bool = False  # the most probable action instead of a sampled one


def settings_of(folder: Path) -> dict:
    """config.json of the Stage 1 run behind a run's folder: it names domain and observations."""
    config = common.read_json(folder / "config.json")
    return config if "domain" in config else common.read_json(Path(config["stage1"]) / "config.json")


def evaluate(folder: Path, episodes: int, seed: int, s: float = 3.0, greedy: bool = False) -> dict:
    """Roll out a run's policy twice: to the true end, for success; and as in Stage 2, for the detector's confusion."""
    settings = settings_of(folder)
    policy, reward_model = common.load(folder / "policy.safetensors"), common.load(folder / "reward.safetensors")
    env = envs.make_vec(settings["domain"], episodes, obs=settings["obs"])
    generator = torch.Generator().manual_seed(seed)
    r = rollout(policy, reward_model, env, 2 * 10**9 + seed * 10**6, generator, "ground-truth", s, greedy)
    success = r["truth"][:, -1].numpy()
    low, high = wilson(int(success.sum()), episodes)
    p = rollout(policy, reward_model, env, 3 * 10**9 + seed * 10**6, generator, "detector", s, greedy)
    truth, detected = p["truth"][:, -1].numpy(), p["detected"]
    return {"success": float(success.mean()), "success_low": low, "success_high": high, "mean_steps": float(r["length"].mean()),
            "eval_episodes": episodes, "true_positives": int((detected & truth).sum()), "false_positives": int((detected & ~truth).sum()),
            "false_negatives": int((~detected & truth).sum()), "true_negatives": int((~detected & ~truth).sum()),
            "false_positive_rate": float((detected & ~truth).sum() / max(1, (~truth).sum())),
            "false_negative_rate": float((~detected & truth).sum() / max(1, truth.sum()))}  # fmt: skip


def describe(summary: dict) -> str:
    return "\n".join(f"{k:20} {v}" for k, v in summary.items())
