"""What a setting of pointmass.py does, over seeds: the README's ablations, and your own.

    python results/ablations.py                           # all of them, three seeds: ten minutes on two cores
    python results/ablations.py --flag "--bins 10"        # your question, two minutes: writes runs/ablations
    python results/ablations.py --flag "--gamma 0.5 --c 0.05" --flag "--gamma 0.99 --c 0.05" --seeds 2

A row is what `python pointmass.py FLAGS --seed S` finds, and how good its detector is on 500 practice episodes
after each stage. What is no flag, like the notebook's label bug, is an exercise: results/exercises.py.
Stage 1 is trained once for each seed and each change of it, and kept in runs/exercises.
Rows that are there already stay, so an interrupted run goes on; after a change of pointmass.py remove the file.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pointmass  # noqa: E402 - the repository's root is not installed
from exercises import practice  # noqa: E402

PUBLISHED = [
    "",
    "--gamma 0",
    "--gamma 1",
    "--success-threshold 3",
    "--success ground-truth",
    "--no-keep-optimizer",
    "--c 0.00714",  # the notebook's 1 / 140
    "--c 0.05",  # the paper's
    "--bins 50",  # the notebook's
    "--episodes 1000",
]


@dataclasses.dataclass
class Args:
    """What a setting of pointmass.py does, over seeds."""

    flag: tuple[str, ...] = ()  # flags of pointmass.py, quoted; several are compared; none: the README's rows
    seeds: int = 3  # seeds 0, 1, ...
    processes: int = 2  # at once, of one thread each
    out: Path | None = None  # the table; None: results/pointmass_ablations.csv, or runs/ablations/{flags}.csv


def changes_of(flags: str) -> dict:
    """`--gamma 0` -> {"gamma": 0.0}."""
    given = dataclasses.asdict(tyro.cli(pointmass.Config, args=shlex.split(flags)))
    return {k: v for k, v in given.items() if v != getattr(pointmass.Config, k)}


def detector(
    agent: pointmass.Agent, reward_model: pointmass.Agent, s: float, n: int = 500
) -> dict[str, float]:
    """Of n practice episodes: which share of detections is right, which share of arrivals was detected."""
    rng = torch.Generator().manual_seed(10**6)  # episodes that nobody has seen
    b = pointmass.rollout(agent, reward_model, n, rng, lambda d, truth: d <= s)
    detected, arrived = b["d"][:, -1] <= s, b["truth"][:, 1:].any(1)
    right = (detected & b["truth"][:, -1]).sum().item()
    return {
        "precision": right / max(1, detected.sum().item()),
        "recall": right / max(1, arrived.sum().item()),
    }


def run(flags: str, seed: int) -> tuple[dict, list[dict]]:
    """A row of the table, and the metrics of practice."""
    torch.set_num_threads(1)
    start, changes = time.time(), changes_of(flags)
    cfg = pointmass.Config(**changes | {"seed": seed})
    with contextlib.redirect_stdout(io.StringIO()):
        agent, optimizer, s, rng = practice.stage1(cfg, changes)
        s = s if cfg.success_threshold is None else cfg.success_threshold
        clone = copy.deepcopy(agent)
        metrics = pointmass.stage2(agent, optimizer, s, cfg, rng)
        told = {"stage2": pointmass.evaluate(agent, rng)}
    told["stage1"] = pointmass.evaluate(clone, torch.Generator().manual_seed(seed))
    row = {"flags": flags, "seed": seed, "success_threshold": s}
    for stage, actor in (("stage1", clone), ("stage2", agent)):
        of_stage = {key: told[stage][key] for key in ("success", "mean_steps")} | detector(actor, clone, s)
        row |= {f"{stage}_{key}": value for key, value in of_stage.items()}
    last = {key: metrics[-1][key] for key in ("env_steps", "true_at_end", "detected")}
    return row | last | {"seconds": round(time.time() - start, 1)}, metrics


def table(rows: list[dict]) -> str:
    """Mean and range over seeds, a line a setting."""
    lines = [
        "| flags | seeds | success after practice | steps | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for flags in dict.fromkeys(row["flags"] for row in rows):
        cells = []
        for key, digits in (("success", 3), ("mean_steps", 1), ("precision", 2), ("recall", 2)):
            values = sorted(float(row[f"stage2_{key}"]) for row in rows if row["flags"] == flags)
            mean = sum(values) / len(values)
            cells.append(f"{mean:.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})")
        lines.append(
            " | ".join([f"| {f'`{flags}`' if flags else 'default'}", str(len(values)), *cells]) + " |"
        )
    return "\n".join(lines)


def picture(path: Path, curves: dict[str, list[list[dict]]]) -> None:
    """Practice of each setting, a line a seed: success and steps over environment steps."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
    axes[1].axhline(12.5, color="grey", ls="--", lw=1, label="PD straight to the goal")
    for (flags, seeds), colour in zip(curves.items(), colours, strict=False):
        for i, metrics in enumerate(seeds):
            label = f"{flags or 'default'}, n = {len(seeds)}" if i == 0 else None
            steps = [row["env_steps"] for row in metrics]
            for ax, key in zip(axes, ("true_at_end", "mean_steps"), strict=True):
                ax.plot(steps, [row[key] for row in metrics], color=colour, lw=1, alpha=0.8, label=label)
    axes[0].set(ylabel="ended in the goal", xlabel="environment steps of practice", ylim=(0, 1))
    axes[1].set(ylabel="steps of a practice episode", xlabel="environment steps of practice", ylim=(0, None))
    axes[1].legend(fontsize=8)
    fig.savefig(path, dpi=130)


def of_one_stage1(seed: int, settings: list[str]) -> list[tuple[dict, list[dict]]]:
    """Settings that share Stage 1, one after the other, so that it is trained once."""
    return [run(flags, seed) for flags in settings]


def main(args: Args) -> None:
    settings = ["", *args.flag] if args.flag else PUBLISHED
    name = "_".join(flags.replace("--", "").replace(" ", "=") for flags in args.flag)
    own = Path("runs") / "ablations" / f"{name}.csv"
    out = args.out or (own if args.flag else ROOT / "results" / "pointmass_ablations.csv")
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(row["flags"], int(row["seed"])) for row in rows}
    jobs: dict[str, tuple[int, list[str]]] = {}
    for seed in range(args.seeds):
        for flags in settings:  # a wrong flag ends it here, with tyro's message
            of_stage1 = {k: v for k, v in changes_of(flags).items() if k in practice.OF_STAGE1}
            if (flags, seed) not in done:
                jobs.setdefault(f"{seed} {of_stage1}", (seed, []))[1].append(flags)
    out.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[dict]]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        running = [pool.submit(of_one_stage1, *job) for job in jobs.values()]
        for job in tqdm(as_completed(running), total=len(running), disable=None):
            for row, metrics in job.result():
                rows.append({key: str(value) for key, value in row.items()})
                curves.setdefault(row["flags"], []).append(metrics)
            rows.sort(key=lambda row: (int(row["seed"]), settings.index(row["flags"])))
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows))
    print(f"wrote {out}")
    if args.flag and curves:
        picture(out.with_suffix(".png"), {flags: curves[flags] for flags in settings if flags in curves})
        print(f"wrote {out.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Args))
