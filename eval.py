"""Evaluation: true success with intervals, the detector's confusion table, videos, steps-to-go traces, figures.

    python eval.py                                      # the newest run
    python eval.py --run runs/pointmass-stage2-s0 --episodes 1000
    python eval.py --run runs/pointmass-stage1-s0 --greedy

Writes into the run's folder: evaluation.json, trajectories.png (as Figure 9), steps_to_go.png (as Figure 2),
episodes.gif, and for Stage 2 curves.png.
"""

from __future__ import annotations

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from common import UserError, options
from common.cli import cli
from common.options import Count, Positive, Size, Whole
from common.runs import describe, newest_run, write_json
from common.setup import load_run, make_env, run_settings
from rollout import evaluate, rollout

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe-Ito: colour-blind safe


@dataclass
class Config:
    run: str | None = None  # folder of a Stage 1 or Stage 2 run; None: the newest finished one
    episodes: Count = 500  # evaluation episodes
    seed: Whole = 0  # of the episodes and the sampled actions
    success_threshold: Size | None = (
        None  # s of the detector; None: the run's own, of a Stage 1 run the domain's
    )
    policy: str = "policy"  # which of the run's checkpoints acts; early_policy: the best at cloning, on Aloha
    temperature: Positive | None = None  # of the sampled actions; None: the domain's
    greedy: bool = False  # the most probable action instead of a sampled one


# --- pictures -----------------------------------------------------------------------------------------------
def film(folder: Path, seed: int, s: float, greedy: bool, policy: str, temperature: float) -> None:
    """Eight episodes to their true end: trajectories.png, episodes.gif and, of one of them, steps_to_go.png."""
    env, actor, reward_model = load_run(folder, 8, policy)
    frames, tracks = [], []

    def watch() -> None:
        frames.append(np.stack(env.render()))  # (8, H, W, 3)
        tracks.append(env.track())  # (8, 2)

    generator = torch.Generator().manual_seed(seed)
    ends = lambda d, truth: truth
    r = rollout(actor, reward_model, env, 6 * 10**8 + seed, generator, ends, temperature, greedy, watch=watch)
    frames, tracks, length = np.stack(frames, 1), np.stack(tracks, 1), r.length  # (8, T + 1, ...)
    goals = [r.goals[int((r.row == i).nonzero()[0])] for i in range(8)]
    height, width = frames.shape[2:4]

    fig, axes = plt.subplots(2, 4, figsize=(12, 6 * height / width + 1.4))
    for i, ax in enumerate(axes.flat):
        ax.imshow(frames[i, 0])
        ax.plot(*(tracks[i, : length[i] + 1] * (width, height)).T, ".-", color="black", lw=1, ms=3)
        outcome = "reached" if r.truth[i, -1] else "not reached"
        ax.set_title(f"{textwrap.fill(goals[i], 42)}\n{outcome} in {length[i]} steps", fontsize=8)
        ax.axis("off")
    fig.savefig(folder / "trajectories.png", dpi=130, bbox_inches="tight")

    last = range(int(length[:4].max()) + 1)  # an episode that has ended stands still
    pictures = [
        Image.fromarray(np.concatenate([frames[i, min(t, length[i])] for i in range(4)], 1)) for t in last
    ]
    pictures[0].save(folder / "episodes.gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=round(1000 / env.metadata["render_fps"]))  # fmt: skip

    reached = np.flatnonzero(r.truth[:, -1].numpy())
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
    axes["d"].plot(t, r.d[i, : length[i] + 1], ".-", color=BLUE, label="d(o, g), predicted")
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
        ("share of practice episodes", [("true at the end", "true_at_end"), ("detected", "detected")]),
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
    options.check(cfg)
    folder = Path(cfg.run) if cfg.run else newest_run("*-stage[12]-s*")
    if folder is None:
        raise UserError("runs/: no finished run; run `python stage1.py` first or name a run with --run")
    settings = run_settings(folder)
    env = make_env(settings["domain"], 1, obs=settings["obs"])
    threshold = settings.get("success_threshold", env.success_threshold)
    options.fill(cfg, {"success_threshold": threshold, "temperature": env.temperature})
    practised = "gamma" in settings
    if practised and not (folder / "metrics.csv").exists():
        raise UserError(f"{folder}/metrics.csv: missing; name a finished run with --run")
    how = {"temperature": cfg.temperature, "greedy": cfg.greedy, "policy": cfg.policy}
    summary = {"run": str(folder), "seed": cfg.seed} | how
    summary |= evaluate(folder, cfg.episodes, cfg.seed, cfg.success_threshold, **how)
    write_json(folder / "evaluation.json", summary)
    film(folder, cfg.seed, cfg.success_threshold, cfg.greedy, cfg.policy, cfg.temperature)
    if practised:
        curves(folder)
    print(describe(summary))
    print(f"wrote evaluation.json and pictures to {folder}/")


if __name__ == "__main__":
    cli(Config, main)
