"""Pictures of episodes and of practice. Arrays in, matplotlib figures out: knows no model and no domain."""

from __future__ import annotations

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import patheffects
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe-Ito: colour-blind safe
WIDTH = 8.3  # inches of a picture: at GitHub's 830 pixels a letter of 8 points is 11 pixels high
plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "axes.titlesize": 9, "savefig.dpi": 150})


@dataclass
class Film:
    """What a camera saw of n episodes, and what was thought of it."""

    frames: np.ndarray  # uint8 (n, T + 1, H, W, 3)
    tracks: np.ndarray  # float (n, T + 1, 2): where the thing that moves is, in shares of a frame
    goals: list[str]
    length: np.ndarray  # int (n,) [steps]
    reached: np.ndarray  # bool (n,): true success
    d: np.ndarray  # float (n, T + 1) [steps]

    def part(self, n: int) -> Film:
        """Its first n episodes."""
        return Film(**{name: value[:n] for name, value in vars(self).items()})


def close() -> None:
    plt.close("all")


def trajectories(film: Film) -> plt.Figure:
    """Each episode's first frame and, below it, its last one with the way of what moves, white on black."""
    n, _, height, width = film.frames.shape[:4]
    rim = [patheffects.Stroke(linewidth=2.8, foreground="black"), patheffects.Normal()]
    size = WIDTH, n / 4 * (WIDTH / 2 * height / width + 0.55)
    fig, axes = plt.subplots(n // 2, 4, figsize=size, layout="constrained")
    for i in range(n):
        end, row, column = int(film.length[i]), i // 4 * 2, i % 4
        first, last = axes[row, column], axes[row + 1, column]
        first.imshow(film.frames[i, 0])
        first.set_title(textwrap.fill(film.goals[i], 28), fontsize=8)
        last.imshow(film.frames[i, end])
        way = film.tracks[i, : end + 1] * (width, height)
        last.plot(*way.T, "-", color="white", lw=1.3, path_effects=rim)
        last.plot(*way[0], "o", color="white", mec="black", ms=4)  # where it began
        outcome = "reached in" if film.reached[i] else "NOT reached,"
        last.set_title(f"{outcome} {end} steps", fontsize=8)
        first.axis("off")
        last.axis("off")
    return fig


def steps_to_go(film: Film, s: float) -> plt.Figure:
    """d(o, g) over the longest successful episode, and six of its frames (the paper's Figure 2)."""
    reached = np.flatnonzero(film.reached)
    i = int(reached[np.argmax(film.length[reached])]) if len(reached) else 0
    end = int(film.length[i])
    t = np.arange(end + 1)
    marks = np.unique(np.linspace(0, end, 6).astype(int))
    names = [f"t = {mark}" for mark in marks]
    layout = [names, ["d"] * len(names)]
    fig, axes = plt.subplot_mosaic(layout, figsize=(WIDTH, 4.2), height_ratios=[1, 2], layout="constrained")
    for name, mark in zip(names, marks, strict=True):
        axes[name].imshow(film.frames[i, mark])
        axes[name].set_title(name, fontsize=8)
        axes[name].axis("off")
        axes["d"].axvline(mark, color="0.85", zorder=0)
    axes["d"].plot(t, film.d[i, : end + 1], ".-", color=BLUE, label="d(o, g), predicted")
    if film.reached[i]:
        axes["d"].plot(t, end - t, color=ORANGE, ls="--", label="steps truly left in this episode")
    axes["d"].axhline(s, color=GREEN, ls=":", label=f"the detector's threshold, s = {s:.3g}")
    axes["d"].set(xlabel="t [steps]", ylabel="steps to go", title=f'"{film.goals[i]}"')
    axes["d"].legend()
    return fig


def save_gif(films: list[Film], path: Path, fps: float) -> None:
    """Films one above the other, their episodes side by side; an episode that has ended stands still."""
    pictures = []
    for t in range(max(int(film.length.max()) for film in films) + 1):
        rows = []
        for film in films:
            now = [frames[min(t, end)] for frames, end in zip(film.frames, film.length, strict=True)]
            rows.append(np.concatenate(now, 1))
        pictures.append(Image.fromarray(np.concatenate(rows, 0)))
    pictures += pictures[-1:] * max(1, round(fps))  # the end for a second
    pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0, duration=round(1000 / fps))


def curves(metrics: Path) -> plt.Figure:
    """A Stage 2 run's metrics.csv: true success, what the detector believed, length, returns, entropy."""
    with open(metrics, newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    panels = [
        ("share of practice episodes", [("true at the end", "true_at_end"), ("detected", "detected")]),
        ("steps per episode", [("mean, one seed", "mean_steps")]),
        ("return R [steps]", [("mean", "return_mean"), ("standard deviation", "return_std")]),
        ("entropy of the action [nats]", [("mean, one seed", "entropy")]),
    ]
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 5), layout="constrained")
    for ax, (name, lines) in zip(axes.flat, panels, strict=True):
        for (label, key), colour in zip(lines, (BLUE, ORANGE), strict=False):
            x = [row["env_steps"] / 1000 for row in rows]
            ax.plot(x, [row[key] for row in rows], color=colour, label=label)
        ax.set(xlabel="environment steps [thousands]", ylabel=name)
        ax.legend()
    axes[0, 0].set_ylim(-0.02, 1.05)
    return fig
