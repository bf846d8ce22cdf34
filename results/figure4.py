"""The paper's Figure 4 in small: three starts of the reward model, one start of the policy. Whose d can be practised on?

    python results/figure4.py                         # hours: trains what is not in runs/ yet, measures, draws
    python results/figure4.py --seed 1                # a seed alone, in a process of its own
    python results/figure4.py --pilot                 # the same in tiny, to see that all of it works

The pointmass from images. The policy is always Stage 1 from the whole Stage 0. The reward model, whose d pays and
ends the episodes, is Stage 1 from the whole Stage 0, from the unimodal one, or from scratch, on the same
demonstrations. Whatever is interrupted goes on when the command is given again; a row of the CSV that is there is not
measured again.

Writes results/figure4.csv, figure4.png, and the table of docs/pretraining.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from measuring import (  # noqa: E402
    TINY_PRACTICE,
    chosen,
    finish,
    logged,
    once,
    predicted,
    publish,
    rank_correlation,
    require_shares,
    table,
    with_interval,
)

import stage0  # noqa: E402 - the repository's root is not installed
import stage1  # noqa: E402
import stage2  # noqa: E402
from common import demos  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, Whole, check, must  # noqa: E402
from common.pictures import BLUE, GREEN, ORANGE, WIDTH, plt  # noqa: E402
from common.runs import read_json  # noqa: E402
from common.setup import load_run  # noqa: E402
from tokens import StepsToGo  # noqa: E402

STARTS = {"whole": BLUE, "unimodal": ORANGE, "scratch": GREEN}
SETTINGS = ("episodes", "stage0_updates", "iterations", "symmetries", "stage0_per_seed")
# success by share: Stage 1, and Stage 2 by start; simulated LanguageTable, the last digit read off the plot
PAPER = {
    0.1: {"stage 1": 0.45, "whole": 0.745, "unimodal": 0.585, "scratch": 0.45},
    0.2: {"stage 1": 0.57, "whole": 0.89, "unimodal": 0.69, "scratch": 0.60},
    0.8: {"stage 1": 0.585, "whole": 0.97, "unimodal": 0.845, "scratch": 0.86},
}
PAGE = Path("docs/pretraining.md")


@dataclass
class Config:
    seeds: Count = 3  # seeds 0, 1, ...
    seed: Whole | None = None  # this one alone; nothing is drawn
    shares: tuple[float, ...] = (0.1, 0.8)  # of the demonstrations to learn from
    episodes: Count = 6000  # demonstrations recorded for a seed
    stage0_updates: Count = 6000
    updates: tuple[int, ...] = (3000, 9000)  # of Stage 1, a number for each share
    iterations: Count = 300  # of Stage 2, at most; less without a gain
    eval_episodes: Count = 500  # fresh ones of a measurement
    symmetries: bool = False  # of the demonstrations; they, too, stand in for the web
    stage0_per_seed: bool = False  # a Stage 0 for each seed; else all start from those of seed 0
    pilot: bool = False  # everything tiny, in runs/figure4-pilot/


# --- measurements -----------------------------------------------------------------------------------------------------
def d_and_truth(run: Path, episodes: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """d, and the steps truly left, of every observation of held-out demonstrations: float (M,) each.

    The same ones for all shares: none of them learns from them.
    """
    env, _, reward_model = load_run(run, 1)
    steps = StepsToGo(env.steps_cap, env.steps_bins)
    whole = {"data_fraction": 1.0, "symmetries": False}
    _, valid = demos.load(SimpleNamespace(**read_json(run / "config.json") | whole), env)
    rows = np.flatnonzero(valid.episode < episodes)
    return predicted(reward_model, valid, rows, steps), valid.steps.numpy()[rows].astype(float)


def detector(practice: list[dict[str, float]]) -> dict[str, float]:
    """Of Stage 2's metrics.csv: of the episodes that the detector ended, the share that truly were in the goal; of
    those that truly were when they ended, the share that it ended. Every iteration counts the same."""
    detected, wrong, true = (
        sum(row[k] for row in practice) for k in ("detected", "false_positives", "true_at_end")
    )
    precision = (detected - wrong) / detected if detected else math.nan
    return {"precision": precision, "recall": (detected - wrong) / true if true else math.nan}


def measure(policy: Path, reward: Path, practised: Path) -> dict[str, float]:
    """A row: Stage 1 of the policy, Stage 2, d on held-out demonstrations, the detector in practice."""
    before, after = read_json(policy / "summary.json"), read_json(practised / "summary.json")
    told = {f"stage1_{k}": before[k] for k in ("success", "mean_steps")}
    told |= {k: after[k] for k in ("success", "success_low", "success_high", "mean_steps", "eval_episodes")}
    told["rank_correlation"] = rank_correlation(*d_and_truth(reward))
    told |= detector(logged(practised))
    told["success_threshold"] = after["success_threshold"]  # of this reward model
    told["reward_run_success"] = read_json(reward / "summary.json")["success"]  # cloned from this start
    return told | {"practice_episodes": after["episodes"]}


# --- training ---------------------------------------------------------------------------------------------------------
Folders = dict[
    str, tuple[Path, Path, Path]
]  # by start: the policy's Stage 1 run, the reward model's, Stage 2's


def train(cfg: Config, runs: Path, share: float, updates: int, seed: int) -> Folders:
    """Every run of a share and seed, trained if it is not there."""
    tiny0, tiny1, tiny2 = {}, {}, {}
    if cfg.pilot:
        tiny0 = {"batch": 8, "eval_every": cfg.stage0_updates}
        tiny1 = {"batch": 8, "eval_every": updates}
        tiny2 = TINY_PRACTICE
    first = seed if cfg.stage0_per_seed else 0
    init = {"scratch": "none"}
    for start in ("whole", "unimodal"):
        of_stage0 = {"updates": cfg.stage0_updates, "seed": first, "unimodal": start == "unimodal"}
        folder = f"{runs}/{start}-stage0-s{first}"
        init[start] = str(finish(stage0.main, stage0.Config(**of_stage0 | tiny0, out=folder)))
    of_stage1 = {"obs": "images", "episodes": cfg.episodes, "data_fraction": share, "updates": updates}
    of_stage1 |= {"symmetries": cfg.symmetries, "seed": seed, "eval_episodes": cfg.eval_episodes}
    taught, made = {}, {}
    for start in STARTS:
        out = f"{runs}/{start}-{share:g}-stage1-s{seed}"
        how = of_stage1 | tiny1 | {"init": init[start], "out": out}
        taught[start] = finish(stage1.main, stage1.Config(**how))
    of_stage2 = {"iterations": cfg.iterations, "seed": seed, "eval_episodes": cfg.eval_episodes}
    for start in STARTS:
        judged = {"stage1": str(taught["whole"]), "reward_run": str(taught[start])}
        out = f"{runs}/{start}-{share:g}-stage2-s{seed}"
        practised = finish(stage2.main, stage2.Config(**of_stage2 | tiny2 | judged, out=out))
        made[start] = taught["whole"], taught[start], practised
    return made


# --- what comes out ---------------------------------------------------------------------------------------------------
def values(rows: list[dict[str, str]], start: str, share: float, column: str) -> list[float]:
    """Of every seed that has one: a detector that never fires has no precision."""
    told = [float(row[column]) for row in chosen(rows, start=start, share=float(share))]
    return [value for value in told if not math.isnan(value)]


def draw(rows: list[dict[str, str]], cfg: Config) -> plt.Figure:
    """Success after practice by start and share, a dot a seed, Stage 1 as a line; the paper's; d's rank correlation."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained")
    ours, paper, order = axes
    for j, (start, colour) in enumerate(STARTS.items()):
        for ax, column in ((ours, "success"), (order, "rank_correlation")):
            for i, share in enumerate(cfg.shares):
                told = values(rows, start, share, column)
                ax.bar(
                    i + 0.27 * (j - 1),
                    np.mean(told or [0]),
                    0.25,
                    color=colour,
                    label=start if i == 0 else None,
                )
                ax.plot([i + 0.27 * (j - 1)] * len(told), told, "o", color="black", ms=2.5)
        for i, of_paper in enumerate(PAPER.values()):
            paper.bar(i + 0.27 * (j - 1), of_paper[start], 0.25, color=colour)
    for ax, before in (
        (ours, [np.mean(values(rows, "whole", share, "stage1_success")) for share in cfg.shares]),
        (paper, [of_paper["stage 1"] for of_paper in PAPER.values()]),
    ):
        for i, height in enumerate(before):
            label = "Stage 1's policy" if i == 0 else None
            ax.plot([i - 0.42, i + 0.42], [height] * 2, "k--", lw=1, label=label)
        ax.set(ylim=(0, 1.02), ylabel="success after practice")
    titles = (
        f"here, {cfg.seeds} seed{'s' * (cfg.seeds > 1)}",
        "the paper's Figure 4",
        "d and the steps truly left",
    )
    for ax, title, shares in zip(axes, titles, (cfg.shares, PAPER, cfg.shares), strict=True):
        ax.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        ax.set(title=title, xlabel="of the demonstrations")
    order.set(ylabel="rank correlation")
    fig.legend(*ours.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def summary(rows: list[dict[str, str]], cfg: Config) -> str:
    """One line a share and start: the mean and, of several seeds, the least and the greatest."""
    lines = []
    for share in cfg.shares:
        for start in STARTS:
            line = [f"{share:.0%}", start]
            for column, digits in (
                ("stage1_success", 2),
                ("success", 2),
                ("mean_steps", 1),
                ("rank_correlation", 2),
                ("precision", 2),
                ("recall", 2),
            ):
                line.append(with_interval(chosen(rows, start=start, share=float(share)), column, digits))
            of_paper = PAPER.get(share, {})
            lines.append([*line, f"{of_paper[start]:.3g}" if of_paper else ""])
    head = ["data", "d from", "Stage 1", "Stage 2", "steps", "rank correlation", "precision", "recall"]
    return table([*head, "paper's Stage 2"], lines)


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/figure4"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/figure4-pilot")
        cfg.seeds, cfg.shares, cfg.episodes = 1, (0.5,), 20
        cfg.stage0_updates = cfg.iterations = cfg.eval_episodes = 2
        cfg.updates = (2,)
    require_shares(cfg.shares, cfg.episodes)
    one_each = f"--updates: {len(cfg.updates)} numbers for {len(cfg.shares)} --shares; name one for each"
    must([
        (len(cfg.updates) == len(cfg.shares), one_each),
        (min(cfg.updates, default=1) > 0, "--updates: must be at least 1"),
    ])  # fmt: skip
    runs.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(cfg).items() if name in SETTINGS}
    rows = []
    for seed in range(cfg.seeds) if cfg.seed is None else [cfg.seed]:
        for share, updates in zip(cfg.shares, cfg.updates, strict=True):
            for start, folders in train(cfg, runs, share, updates, seed).items():
                key = {"start": start, "share": share, "seed": seed, "updates": updates} | settings
                rows.append(once(out / "figure4.csv", key, lambda folders=folders: measure(*folders)))
    if cfg.seed is not None:
        return
    draw(rows, cfg).savefig(out / "figure4.png")
    plt.close("all")
    told = summary(rows, cfg)
    print(told)
    if not cfg.pilot:
        picture = "![Success after practice by start](../results/figure4.png)"
        publish(PAGE, "figure 4", told, cfg.seeds, picture)


if __name__ == "__main__":
    cli(Config, main)
