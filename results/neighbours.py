"""The baselines' own tables: iRe-VLA's Table I and Figure 5 in small, RoboFuME's Tables I and II with its ablations.

    python results/neighbours.py                     # hours: trains what is not in runs/ yet, and measures
    python results/neighbours.py --seed 1            # one seed of it, without the tables: for one of two processes
    python results/neighbours.py --papers irevla     # or one of the papers
    python results/neighbours.py --pilot             # the same in tiny, to see that all of it works

RoboFuME starts from the Stage 1 runs of three_ways.py, iRe-VLA from runs whose demonstrations have no new task.
Whatever is interrupted goes on when the command is given again, and several processes may work at once.

Writes results/irevla.csv, results/robofume.csv, and the tables of docs/baselines.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from three_ways import (  # noqa: E402
    Stage1Flags,
    as_text,
    finish,
    logged,
    measured,
    put,
    short_episodes,
    spread,
    table,
    taught,
    write_csv,
)

from baselines import irevla, robofume  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, Whole, check  # noqa: E402
from common.runs import read_json  # noqa: E402

VARIANTS = {  # of iRe-VLA: what PPO trains, what cloning trains
    "PPO-Replay": {"explores": "all"},
    "iRe-VLA": {},
    "iRe-VLA-freeze": {"consolidates": "head"},
}
STAGES = ("task1_rl", "task1_sl", "task2_rl", "task2_sl")
ABLATIONS = {  # of RoboFuME, seed 0 alone
    "true reward": {"reward": "truth"},
    "our detector as reward": {"reward": "detector"},
    "no cloning term": {"bc_weight": 0.0},
    "CQL": {"calibrate": False},
    "no prior data": {"prior_data": False, "env_steps": 1},  # offline alone, as in the paper's Table IV
}


@dataclass
class Config(Stage1Flags):
    seeds: Count = 3  # seeds 0, 1, ...
    seed: Whole | None = None  # this one alone, and no table is written
    papers: tuple[Literal["irevla", "robofume"], ...] = ("irevla", "robofume")
    episodes: Count = 500  # fresh ones of a measurement
    pilot: bool = False  # everything tiny, in runs/neighbours-pilot/


def main(cfg: Config) -> None:
    check(cfg)
    runs, starts, out = Path("runs/neighbours"), Path("runs/three-ways"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/neighbours-pilot")
        starts = Path("runs/three-ways-pilot")
        cfg.seeds, cfg.episodes = 1, 4
    runs.mkdir(parents=True, exist_ok=True)
    seeds = range(cfg.seeds) if cfg.seed is None else [cfg.seed]
    for paper, measure, tabulate in (
        ("irevla", of_irevla, irevla_table),
        ("robofume", of_robofume, robofume_table),
    ):
        if paper not in cfg.papers:
            continue
        with short_episodes(cfg.pilot):
            rows = [row for seed in seeds for row in measure(cfg, runs, starts, seed)]
        if cfg.seed is not None:
            continue  # a part of it: the command without --seed collects all
        write_csv(out / f"{paper}.csv", rows)
        told = tabulate(rows)
        print(told)
        if not cfg.pilot:
            put(paper, told)


def of_irevla(cfg: Config, runs: Path, starts: Path, seed: int) -> list[dict[str, str]]:
    """The rows of one seed of iRe-VLA's table; what is not there is trained and measured."""
    start, tiny, rows = taught(cfg, runs / f"prior-stage1-s{seed}", "prior", seed), {}, []
    if cfg.pilot:
        tiny = {"env_steps": 50, "collect_steps": 50, "tuples": 32, "num_envs": 4, "sl_updates": 4,
                "eval_episodes": 4, "warmup": 0, "least_successes": 0}  # fmt: skip
    places = [("SFT", start, "policy")]
    for variant, flags in VARIANTS.items():
        how = tiny | flags | {"stage1": str(start), "seed": seed, "out": f"{runs}/{variant}-s{seed}"}
        folder = finish(irevla.main, irevla.Config(**how))
        places += [(variant, folder, stage) for stage in STAGES]
    for variant, folder, checkpoint in places:
        for task in ("prior", "forward", "second", "backward", "unseen"):
            key = {"variant": variant, "seed": seed, "checkpoint": checkpoint, "task": task}
            rows.append(as_text(key) | measured(folder, checkpoint, task, cfg.episodes))
    return rows


def of_robofume(cfg: Config, runs: Path, starts: Path, seed: int) -> list[dict[str, str]]:
    """The rows of one seed of RoboFuME's table; what is not there is trained and measured."""
    start, tiny, rows = taught(cfg, starts / f"stage1-s{seed}", "practice", seed), {}, []
    if cfg.pilot:
        tiny = {"failures": 2, "judge_updates": 4, "offline_updates": 4, "env_steps": 120, "batch": 16, "num_envs": 4,
                "warmup": 0, "eval_episodes": 4}  # fmt: skip
    places = [("Stage 1", start, "policy")]
    for name, flags in {"RoboFuME": {}, **(ABLATIONS if seed == 0 else {})}.items():
        how = {"stage1": str(start), "seed": seed, "out": f"{runs}/{name.replace(' ', '-')}-s{seed}"}
        folder = finish(robofume.main, robofume.Config(**tiny | flags | how))
        places += [(name, folder, checkpoint) for checkpoint in ("offline", "policy")]
    for name, folder, checkpoint in places:
        judged = judge_rates(folder) if checkpoint == "policy" and folder != start else NOT_JUDGED
        for task in ("forward", "backward", "prior"):
            key = {"name": name, "seed": seed, "checkpoint": checkpoint, "task": task}
            rows.append(as_text(key) | measured(folder, checkpoint, task, cfg.episodes) | as_text(judged))
    return rows


RATES = ("false_positive_rate", "false_negative_rate", "precision", "base_rate")
NOT_JUDGED = dict.fromkeys((*RATES, "resets_per_1000_steps"), math.nan)


def judge_rates(folder: Path) -> dict[str, float]:
    """The judge in practice, a mean over rounds, and the operator's resets in 1,000 steps of it."""
    rounds = [row for row in logged(folder) if not math.isnan(row["base_rate"])]
    if not rounds:
        return NOT_JUDGED
    began = logged(folder)[0]["env_steps"]  # offline: behind the failures
    steps = read_json(folder / "summary.json")["env_steps"] - began
    rates = {k: float(np.mean([row[k] for row in rounds])) for k in RATES}
    return rates | {"resets_per_1000_steps": 1000 * rounds[-1]["interventions"] / steps}


def seeds_of(rows: list[dict[str, str]], column: str, **key: str) -> list[float]:
    return [float(row[column]) for row in rows if key.items() <= row.items()]


def irevla_table(rows: list[dict[str, str]]) -> str:
    lines = []
    for variant, checkpoint in [("SFT", "policy"), *((v, s) for v in VARIANTS for s in STAGES)]:
        line = [variant, "" if variant == "SFT" else checkpoint]
        for task in ("prior", "forward", "second", "backward", "unseen"):
            key = {"variant": variant, "checkpoint": checkpoint, "task": task}
            steps = spread(seeds_of(rows, "mean_steps", **key), 0)
            line.append(f"{spread(seeds_of(rows, 'success', **key), 2)}, {steps}")
        lines.append(line)
    return table(["", "after", "prior", "forward", "second", "backward", "unseen"], lines)


def robofume_table(rows: list[dict[str, str]]) -> str:
    lines = []
    names = [
        ("Stage 1", "policy"),
        *((n, c) for n in ("RoboFuME", *ABLATIONS) for c in ("offline", "policy")),
    ]
    for name, checkpoint in names:
        if (name, checkpoint) == ("no prior data", "policy"):
            continue  # it does not practise
        line = [name, {"offline": "offline", "policy": "practice"}[checkpoint] if name != "Stage 1" else ""]
        for task in ("forward", "backward", "prior"):
            key = {"name": name, "checkpoint": checkpoint, "task": task}
            steps = spread(seeds_of(rows, "mean_steps", **key), 0)
            line.append(f"{spread(seeds_of(rows, 'success', **key), 2)}, {steps}")
        for column in (*RATES, "resets_per_1000_steps"):
            values = seeds_of(rows, column, name=name, checkpoint=checkpoint, task="forward")
            line.append("" if math.isnan(values[0]) else spread(values, 3))
        lines.append(line)
    return table(
        ["", "after", "forward", "backward", "prior", "FP", "FN", "precision", "base rate", "resets"], lines
    )


if __name__ == "__main__":
    cli(Config, main)
