"""Evaluation: true success with intervals, the detector's confusion table, videos, steps-to-go traces, figures.

    python eval.py                                      # the newest run
    python eval.py --run runs/pointmass-stage2-s0 --episodes 1000
    python eval.py --run runs/pointmass-stage1-s0 --greedy

Writes into the run's folder: evaluation.json, trajectories.png (as Figure 9), steps_to_go.png (as Figure 2),
episodes.gif, and for Stage 2 curves.png.
"""

from __future__ import annotations

import csv
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from PIL import Image

import common
from common import UserError, wilson
from stage2 import rollout

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe-Ito: colour-blind safe


@dataclass
class Config:
    run: str = ""  # folder of a Stage 1 or Stage 2 run; empty: the newest finished one
    episodes: int = 500  # evaluation episodes
    seed: int = 0  # of the episodes and the sampled actions
    s: float | None = None  # the detector's threshold; None: the run's own, of a Stage 1 run the domain's
    policy: str = "policy"  # which of the run's checkpoints acts; early_policy: the best at cloning where the last is the policy
    temperature: float | None = None  # of the sampled actions; None: the domain's
    greedy: bool = False  # the most probable action instead of a sampled one


def confusion(detected: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Counts and rates of a detector, bool (n,) each: false positives among what is false, false negatives among what is true."""
    counts = {"true_positives": detected & truth, "false_positives": detected & ~truth,
              "false_negatives": ~detected & truth, "true_negatives": ~detected & ~truth}  # fmt: skip
    table = {k: int(v.sum()) for k, v in counts.items()}
    return table | {"false_positive_rate": table["false_positives"] / max(1, int((~truth).sum())),
                    "false_negative_rate": table["false_negatives"] / max(1, int(truth.sum()))}  # fmt: skip


def early_detections(d: np.ndarray, truth: np.ndarray, s: float) -> float:
    """Share of first detections followed by true success within s steps; d float, truth bool (n, T + 1), frozen at the end."""
    fired = np.flatnonzero((d <= s).any(1))
    first = (d[fired] <= s).argmax(1)
    last = np.minimum(first + math.ceil(s), d.shape[1] - 1)
    kept = [truth[i, a : b + 1].any() for i, a, b in zip(fired, first, last, strict=True)]
    return float(np.mean(kept)) if kept else 0.0


def run_env(folder: Path, num_envs: int) -> VectorEnv:
    """The domain of a run, or of the Stage 1 run behind it, num_envs at once."""
    settings = common.read_json(folder / "config.json")
    if "stage1" in settings:
        practised = settings.get("domain")
        settings = common.read_json(Path(settings["stage1"]) / "config.json")
        settings |= {"domain": practised} if practised else {}
    if not {"domain", "obs"} <= settings.keys():
        raise UserError(f"{folder}/config.json: not the configuration of a Stage 1 or Stage 2 run; name another --run")
    return common.make_env(settings["domain"], num_envs, obs=settings["obs"])


def load_run(folder: Path, num_envs: int, policy: str = "policy") -> tuple[VectorEnv, torch.nn.Module, torch.nn.Module]:
    """`run_env`, and the run's policy and reward model."""
    env = run_env(folder, num_envs)
    acting = common.load(folder / f"{policy}.safetensors", env)
    return env, acting, common.load(folder / "reward.safetensors", env, acting)


def evaluate(folder: Path, episodes: int, seed: int, s: float, greedy: bool = False, policy: str = "policy",
             temperature: float | None = None) -> dict:  # fmt: skip
    """Roll out a run's policy twice: to the true end, for success; and as in Stage 2, for the detector's confusion.

    Confusion: did the detector end the episode, and was the goal truly reached at that moment? `early_detections` is
    milder: the share of first detections that true success follows within s steps, which is what d <= s claims.
    """
    env, actor, reward_model = load_run(folder, episodes, policy)
    generator = torch.Generator().manual_seed(seed)
    temperature = env.temperature if temperature is None else temperature
    how = {"s": s, "greedy": greedy, "temperature": temperature}
    r = rollout(actor, reward_model, env, 5 * 10**8 + seed * 10**6, generator, "ground-truth", **how)
    success = r["truth"][:, -1].numpy()
    low, high = wilson(int(success.sum()), episodes)
    p = rollout(actor, reward_model, env, 5 * 10**8 + seed * 10**6 + 5 * 10**5, generator, "detector", **how)
    return {"temperature": temperature, "success": float(success.mean()), "success_low": low, "success_high": high,
            "mean_steps": float(r["length"].mean()),
            "eval_episodes": episodes, **confusion(p["detected"], p["truth"][:, -1].numpy()),
            "early_detections": early_detections(r["d"].numpy(), r["truth"].numpy(), s)}  # fmt: skip


def describe(summary: dict) -> str:
    return "\n".join(f"{k:20} {v:.4g}" if isinstance(v, float) else f"{k:20} {v}" for k, v in summary.items())


# --- pictures ---------------------------------------------------------------------------------------------------------
def film(folder: Path, seed: int, s: float, greedy: bool, policy: str, temperature: float) -> None:
    """Eight episodes to their true end: trajectories.png, episodes.gif and, of one of them, steps_to_go.png."""
    env, actor, reward_model = load_run(folder, 8, policy)
    frames, tracks = [], []

    def watch() -> None:
        frames.append(np.stack(env.render()))  # (8, H, W, 3)
        tracks.append(env.track())  # (8, 2)

    generator = torch.Generator().manual_seed(seed)
    r = rollout(actor, reward_model, env, 6 * 10**8 + seed, generator, "ground-truth", s, greedy, watch, temperature=temperature)
    frames, tracks, length = np.stack(frames, 1), np.stack(tracks, 1), r["length"]  # (8, T + 1, ...)
    goals = [r["goals"][int((r["row"] == i).nonzero()[0])] for i in range(8)]
    height, width = frames.shape[2:4]

    fig, axes = plt.subplots(2, 4, figsize=(12, 6 * height / width + 1.4))
    for i, ax in enumerate(axes.flat):
        ax.imshow(frames[i, 0])
        ax.plot(*(tracks[i, : length[i] + 1] * (width, height)).T, ".-", color="black", lw=1, ms=3)
        outcome = "reached" if r["truth"][i, -1] else "not reached"
        ax.set_title(f"{textwrap.fill(goals[i], 42)}\n{outcome} in {length[i]} steps", fontsize=8)
        ax.axis("off")
    fig.savefig(folder / "trajectories.png", dpi=130, bbox_inches="tight")

    last = range(int(length[:4].max()) + 1)  # an episode that has ended stands still
    pictures = [Image.fromarray(np.concatenate([frames[i, min(t, length[i])] for i in range(4)], 1)) for t in last]
    pictures[0].save(folder / "episodes.gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=round(1000 / env.metadata["render_fps"]))  # fmt: skip

    reached = np.flatnonzero(r["truth"][:, -1].numpy())
    i = int(reached[np.argmax(length[reached])]) if len(reached) else 0  # the longest successful episode
    marks = np.unique(np.linspace(0, length[i], 6).astype(int))
    fig, axes = plt.subplot_mosaic(
        [[f"f{k}" for k in range(len(marks))], ["d"] * len(marks)], figsize=(9, 4.4), height_ratios=[1, 2]
    )
    for k, t in enumerate(marks):
        axes[f"f{k}"].imshow(frames[i, t])
        axes[f"f{k}"].set_title(f"t = {t}", fontsize=8)
        axes[f"f{k}"].axis("off")
        axes["d"].axvline(t, color="0.85", zorder=0)
    t = np.arange(length[i] + 1)
    axes["d"].plot(t, r["d"][i, : length[i] + 1], ".-", color=BLUE, label="d(o, g), predicted")
    if len(reached):
        axes["d"].plot(t, length[i] - t, color=ORANGE, ls="--", label="steps truly left in this episode")
    axes["d"].axhline(s, color=GREEN, ls=":", label=f"detector's threshold s = {s:g}")
    axes["d"].set(xlabel="t [steps]", ylabel="steps to go", title=f'"{goals[i]}"')
    axes["d"].legend(fontsize=8)
    fig.savefig(folder / "steps_to_go.png", dpi=130, bbox_inches="tight")
    plt.close("all")


def curves(folder: Path) -> None:
    """curves.png of a Stage 2 run: success, what the detector believed, episode length, returns and entropy."""
    with open(folder / "metrics.csv") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    x = [r["env_steps"] for r in rows]
    fig, axes = plt.subplots(1, 4, figsize=(13, 2.8))
    panels = [
        ("share of practice episodes", [("true at the end", "success"), ("detected", "detected")]),
        ("steps per episode", [("", "mean_steps")]),
        ("return R [steps]", [("mean", "return_mean"), ("standard deviation", "return_std")]),
        ("entropy of the action [nats]", [("", "entropy")]),
    ]
    for ax, (name, lines) in zip(axes, panels, strict=True):
        for (label, key), colour in zip(lines, (BLUE, ORANGE), strict=False):
            ax.plot(x, [r[key] for r in rows], color=colour, label=f"{label} (n = 1 seed)" if label else None)
        ax.set(xlabel="environment steps", ylabel=name)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
        if lines[0][0]:
            ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(folder / "curves.png", dpi=130)
    plt.close("all")


def main(cfg: Config) -> None:
    folder = Path(cfg.run) if cfg.run else common.newest_run("*-stage[12]-s*")
    if folder is None:
        raise UserError("runs/: no finished run; run `python stage1.py` first or name a run with --run")
    if cfg.episodes < 1:
        raise UserError(f"--episodes {cfg.episodes}: must be at least 1")
    settings = common.read_json(folder / "config.json")
    env = run_env(folder, 1)
    cfg.s = settings.get("s", env.success_threshold) if cfg.s is None else cfg.s
    cfg.temperature = env.temperature if cfg.temperature is None else cfg.temperature
    stage2 = "gamma" in settings
    common.require(cfg, 0, "s")
    common.require(cfg, 1e-9, "temperature")
    if stage2 and not (folder / "metrics.csv").exists():
        raise UserError(f"{folder}/metrics.csv: missing; name a finished run with --run")
    how = {"s": cfg.s, "greedy": cfg.greedy, "policy": cfg.policy, "temperature": cfg.temperature}
    summary = {"run": str(folder), "seed": cfg.seed} | how | evaluate(folder, cfg.episodes, cfg.seed, **how)
    common.write_json(folder / "evaluation.json", summary)
    film(folder, cfg.seed, **how)
    if stage2:
        curves(folder)
    print(describe(summary))
    print(f"wrote evaluation.json and pictures to {folder}/")


if __name__ == "__main__":
    common.cli(Config, main)
