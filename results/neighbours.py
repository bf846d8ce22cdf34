"""The baselines' own tables: iRe-VLA's Table I and Figure 5 in small, RoboFuME's Tables I and II with its ablations.

    python results/neighbours.py               # hours: trains what is not in runs/ yet, and measures
    python results/neighbours.py --seeds 1     # one seed of it
    python results/neighbours.py --pilot       # the same in tiny, to see that all of it works

Writes results/irevla.csv, results/robofume.csv, and the tables of docs/baselines.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from measuring import Rows, finish, logged, put, spread, table  # noqa: E402
from three_ways import PAGE, fresh_success  # noqa: E402

import stage1  # noqa: E402 - the repository's root is not installed
from baselines import irevla, robofume  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, check  # noqa: E402
from common.runs import read_json  # noqa: E402

VARIANTS = {  # of iRe-VLA: what PPO trains, what cloning trains
    "PPO-Replay": {"explores": "all"},
    "iRe-VLA": {},
    "iRe-VLA-freeze": {"consolidates": "head"},
}
STAGES = ("task1_rl", "task1_sl", "task2_rl", "task2_sl")
ABLATIONS = {  # of RoboFuME, seed 0 alone
    "true reward": {"reward": "truth"},
    "no cloning term": {"bc_weight": 0.0},
    "CQL": {"calibrate": False},
    "no prior data": {"prior_data": False, "env_steps": 1},  # offline alone, as in the paper's Table IV
}


PILOT_STEPS = 900  # of RoboFuME: the failures alone may take 800


@dataclass
class Config:
    seeds: Count = 3  # seeds 0, 1, ...
    episodes: Count = 500  # fresh ones of a measurement
    pilot: bool = False  # everything tiny, in runs/neighbours-pilot/


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/neighbours"), Path("results")
    of_stage1, of_irevla, of_robofume = {"episodes": 8000, "updates": 6000}, {}, {}
    domains = {"prior": "tabletop,pairs=prior", "practice": "tabletop,pairs=practice"}
    if cfg.pilot:
        runs = out = Path("runs/neighbours-pilot")
        cfg.seeds, cfg.episodes = 1, 4
        of_stage1 = {"episodes": 20, "updates": 20, "eval_every": 20, "eval_episodes": 4}
        of_irevla = {"env_steps": 100, "collect_steps": 50, "tuples": 32, "num_envs": 4, "sl_updates": 4}
        of_robofume = {"failures": 2, "judge_updates": 4, "offline_updates": 4, "env_steps": PILOT_STEPS, "batch": 16,
                       "num_envs": 4, "warmup": 0}  # fmt: skip
        for settings in (of_irevla, of_robofume):
            settings["eval_episodes"] = 4
        domains = dict.fromkeys(domains, "tabletop,pairs=both")
    runs.mkdir(parents=True, exist_ok=True)

    rows = Rows(out / "irevla.csv")
    for seed in range(cfg.seeds):
        how = of_stage1 | {"domain": domains["prior"], "seed": seed, "out": f"{runs}/prior-stage1-s{seed}"}
        taught = finish(stage1.main, stage1.Config(**how))
        places = [("SFT", taught, "policy")]
        for variant, flags in VARIANTS.items():
            how = (
                of_irevla | flags | {"stage1": str(taught), "seed": seed, "out": f"{runs}/{variant}-s{seed}"}
            )
            folder = finish(irevla.main, irevla.Config(**how))
            places += [(variant, folder, stage) for stage in STAGES]
        for variant, folder, checkpoint in places:
            for task in ("prior", "forward", "second", "backward", "unseen"):
                key = {"variant": variant, "seed": seed, "checkpoint": checkpoint, "task": task}
                rows.measure(key, lambda h=(folder, checkpoint, task, cfg.episodes, seed): fresh_success(*h))
    first = irevla_table(rows.rows)

    rows = Rows(out / "robofume.csv")
    for seed in range(cfg.seeds):
        how = of_stage1 | {
            "domain": domains["practice"],
            "seed": seed,
            "out": f"{runs}/practice-stage1-s{seed}",
        }
        taught = finish(stage1.main, stage1.Config(**how))
        measured = [("Stage 1", taught, "policy")]
        for name, flags in {"RoboFuME": {}, **(ABLATIONS if seed == 0 else {})}.items():
            start = {"stage1": str(taught), "seed": seed, "out": f"{runs}/{name.replace(' ', '-')}-s{seed}"}
            folder = finish(robofume.main, robofume.Config(**of_robofume | flags | start))
            measured += [(name, folder, checkpoint) for checkpoint in ("offline", "policy")]
        for name, folder, checkpoint in measured:
            judged = judge_rates(folder) if checkpoint == "policy" and folder != taught else NOT_JUDGED
            for task in ("forward", "backward", "prior"):
                key = {"name": name, "seed": seed, "checkpoint": checkpoint, "task": task}
                how = (folder, checkpoint, task, cfg.episodes, seed)
                rows.measure(key, lambda h=how, j=judged: fresh_success(*h) | j)
    second = robofume_table(rows.rows)

    print(first, second, sep="\n\n")
    if not cfg.pilot:
        put(PAGE, "irevla", first)
        put(PAGE, "robofume", second)


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
