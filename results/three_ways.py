"""Three ways to practise, one task, one budget: ours, iRe-VLA and RoboFuME, side by side.

    python results/three_ways.py              # hours: trains what is not in runs/ yet, measures, draws
    python results/three_ways.py --seeds 1    # one seed of it
    python results/three_ways.py --pilot      # the same in tiny, to see that all of it works

The task: push the red moon to the yellow pentagon. All start from the same Stage 1 policy, which has seen some 80
demonstrations of it among 8,000. Every step of the simulations counts: iRe-VLA's collection, RoboFuME's failures and
its way back. Symmetries are off for all three. Whatever is interrupted goes on when the command is given again; a row
of the CSV that is there is not measured again.

Writes results/three_ways.csv, three_ways.png, and the table of docs/baselines.md.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from measuring import Rows, finish, logged, put, spread, table  # noqa: E402

import stage1  # noqa: E402 - the repository's root is not installed
import stage2  # noqa: E402
from baselines import irevla, robofume  # noqa: E402
from common import UserError  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, check  # noqa: E402
from common.pictures import BLUE, GREEN, ORANGE, WIDTH, plt  # noqa: E402
from common.runs import Run, read_json, wilson, write_atomically  # noqa: E402
from common.setup import load_checkpoint, make_env  # noqa: E402
from rollout import true_success  # noqa: E402

COLOURS = {"nanoEFM, resets": BLUE, "nanoEFM, operator": "#56B4E9", "iRe-VLA": ORANGE, "RoboFuME": GREEN}
PAGE = Path("docs/baselines.md")


@dataclass
class Config:
    seeds: Count = 3  # seeds 0, 1, ...
    env_steps: Count = 100_000  # of practice, for each
    every: Count = 25_000  # steps between two measurements
    episodes: Count = 500  # fresh ones of a measurement
    pilot: bool = False  # everything tiny, in runs/three-ways-pilot/


# --- what results/neighbours.py needs, too ---------------------------------------------------------------------------
def fresh_success(folder: Path, checkpoint: str, task: str, episodes: int, seed: int) -> dict[str, float]:
    """True success of a run's checkpoint at a task, over fresh episodes from reset scenes."""
    env = make_env(f"tabletop,pairs={task}", 1, obs="state")
    policy = load_checkpoint(folder / f"{checkpoint}.safetensors", env)
    return true_success(policy, env, episodes, 5 * 10**8 + seed * 10**6)


# --- practice ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def snapshots(every: int) -> Iterator[None]:
    """Inside, a run keeps a copy of its policy.safetensors each time its practice has passed another `every` steps."""
    checkpoint = Run.checkpoint

    def copy_first(run: Run) -> None:
        passed = getattr(run.tracked["progress"], "env_steps", 0) // every
        for k in range(1, passed + 1):
            copy = run.folder / f"steps{k * every}.safetensors"
            if not copy.exists():
                write_atomically(copy, lambda path: shutil.copy(run.folder / "policy.safetensors", path))
        checkpoint(run)

    Run.checkpoint = copy_first
    try:
        yield
    finally:
        Run.checkpoint = checkpoint


def practise(cfg: Config, runs: Path, seed: int) -> dict[str, Path]:
    """The runs of one seed by method; trained if they are not there."""
    tiny: dict[str, dict] = dict.fromkeys(("stage1", "stage2", "irevla", "robofume"), {})
    if cfg.pilot:
        tiny["stage1"] = {"episodes": 20, "updates": 20, "eval_every": 20, "eval_episodes": 4}
        tiny["stage1"]["domain"] = "tabletop,pairs=both"  # among twenty, one in a hundred would not be there
        tiny["stage2"] = {"updates": 2, "batch": 16, "num_envs": 4, "eval_episodes": 4, "first_look": 4}
        tiny["irevla"] = {"tuples": 32, "num_envs": 4, "sl_updates": 4, "eval_episodes": 4}
        tiny["robofume"] = {"failures": 2, "judge_updates": 4, "offline_updates": 4, "batch": 16, "num_envs": 4,
                            "warmup": 0, "eval_episodes": 4}  # fmt: skip
    of_stage1 = {"episodes": 8000, "updates": 6000, "domain": "tabletop,pairs=practice", "seed": seed}
    taught = finish(
        stage1.main, stage1.Config(**of_stage1 | tiny["stage1"] | {"out": f"{runs}/stage1-s{seed}"})
    )
    start = {"stage1": str(taught), "seed": seed}
    tuples = tiny["stage2"].get("updates", 16) * tiny["stage2"].get("batch", 64)  # of an iteration, at least
    iterations = math.ceil(cfg.env_steps / tuples)
    sixteen = {"num_envs": 16, "iterations": iterations, "patience": iterations}
    ours = start | sixteen | tiny["stage2"]
    # PPO, then what is left of the budget for the successes; an iteration is not cut short, so PPO may take more
    parts = {"env_steps": int(0.8 * cfg.env_steps), "collect_steps": int(0.16 * cfg.env_steps)}
    one_task = {"tasks": ("tabletop,pairs=forward",)}
    clock = {"reset_least": 180.0, "reset_most": 300.0}  # the operator's own, as in the second line of ours
    with snapshots(cfg.every):
        return {
            "nanoEFM, resets": finish(
                stage2.main,
                stage2.Config(**ours, domain="tabletop,pairs=forward", out=f"{runs}/resets-s{seed}"),
            ),
            "nanoEFM, operator": finish(
                stage2.main,
                stage2.Config(
                    **ours, domain="tabletop,pairs=both", operator=True, out=f"{runs}/operator-s{seed}"
                ),
            ),
            "iRe-VLA": finish(
                irevla.main,
                irevla.Config(**start | tiny["irevla"] | parts | one_task, out=f"{runs}/irevla-s{seed}"),
            ),
            "RoboFuME": finish(
                robofume.main,
                robofume.Config(
                    **start | tiny["robofume"] | clock,
                    env_steps=cfg.env_steps,
                    out=f"{runs}/robofume-s{seed}",
                ),
            ),
        }


def cost(method: str, folder: Path, steps: int) -> dict[str, float]:
    """What practice had taken when it had passed so many steps: steps, episodes set up by hand, labels, seconds."""
    rows = logged(folder)
    row = next((row for row in rows if row["env_steps"] >= steps), rows[-1])
    resets, labels = row["episodes"], 0
    if method == "nanoEFM, operator":
        resets = row["interventions"]
    if method == "iRe-VLA":
        labels = row["episodes"]  # true success of each
    if method == "RoboFuME":
        labels = read_json(folder / "summary.json")["labels"]
        by_operator = 0 if math.isnan(row["interventions"]) else row["interventions"]
        resets = labels + by_operator  # the failures' episodes began with a reset
    return {
        "env_steps": int(row["env_steps"]),
        "resets": int(resets),
        "labels": int(labels),
        "seconds": row["seconds"],
    }


def script(task: str, who: str, episodes: int) -> dict[str, float]:
    """A scripted player's success and steps; failures count with their full length."""
    env = make_env(f"tabletop,pairs={task}", episodes, obs="state")
    env.reset(seed=5 * 10**8)
    done, steps = np.zeros(episodes, bool), np.full(episodes, env.horizon)
    for t in range(env.horizon):
        _, _, terminated, _, _ = env.step(getattr(env, who)())
        steps[terminated & ~done] = t + 1
        done |= terminated
    low, high = wilson(int(done.sum()), episodes)
    return {"success": float(done.mean()), "success_low": low, "success_high": high, "mean_steps": float(steps.mean()),
            "eval_episodes": episodes, "env_steps": 0, "resets": 0, "labels": 0, "seconds": 0.0}  # fmt: skip


# --- what comes out ---------------------------------------------------------------------------------------------------
def draw(rows: list[dict[str, str]], runs: dict[int, dict[str, Path]], cfg: Config) -> plt.Figure:
    """Success, steps and the judges' precision over the steps of practice: a thin line a seed, their mean thick."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained")
    for method, colour in COLOURS.items():
        for ax, column in zip(axes, ("success", "mean_steps"), strict=False):
            lines = []
            for seed in range(cfg.seeds):
                mine = [
                    r for r in rows if (r["method"], r["seed"], r["task"]) == (method, str(seed), "forward")
                ]
                mine.sort(key=lambda r: int(r["steps"]))
                lines.append([float(r[column]) for r in mine])
                ax.plot([int(r["steps"]) / 1000 for r in mine], lines[-1], color=colour, lw=0.6, alpha=0.6)
            at = [int(r["steps"]) / 1000 for r in mine]
            ax.plot(at, np.mean(lines, 0), "o-", color=colour, lw=1.8, ms=3, label=method)
        for of_seed in runs.values():
            told = logged(of_seed[method])
            if method == "RoboFuME":
                points = [(r["env_steps"], r["precision"]) for r in told if not math.isnan(r["precision"])]
            elif method == "iRe-VLA":
                continue  # it is told the truth
            else:
                points = [
                    (r["env_steps"], 1 - r["false_positives"] / r["detected"]) for r in told if r["detected"]
                ]
            if points:
                axes[2].plot(np.array(points)[:, 0] / 1000, np.array(points)[:, 1], color=colour, lw=0.8)
    for who, style in (("expert", "--"), ("demonstrate", ":")):
        (line,) = [r for r in rows if r["method"] == who]
        axes[1].axhline(float(line["mean_steps"]), color="black", ls=style, lw=0.8)
        axes[1].annotate(who, (0, float(line["mean_steps"])), fontsize=8, va="bottom")
    titles = ("true success", "steps of an episode", "of what is called done: truly done")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="thousand steps of practice", xlim=(0, cfg.env_steps / 1000))
    axes[0].set_ylim(0, 1.02)
    axes[2].set_ylim(0, 1.02)
    axes[0].legend(title=f"{cfg.seeds} seed{'s' * (cfg.seeds > 1)}", loc="lower right")
    return fig


def summary(rows: list[dict[str, str]], cfg: Config) -> str:
    """One line a method: at the end of the budget, beside Stage 1's policy and the scripts."""

    def values(method: str, task: str, steps: int, column: str) -> list[float]:
        key = {"method": method, "task": task, "steps": str(steps)}
        return [float(r[column]) for r in rows if key.items() <= r.items()]

    lines = []
    for method, name, steps in [("iRe-VLA", "Stage 1", 0), *((m, m, cfg.env_steps) for m in COLOURS)]:
        line = [
            name,
            *(spread(values(method, "forward", steps, c), d) for c, d in (("success", 2), ("mean_steps", 1))),
        ]
        line.append(spread(values(method, "prior", steps, "success"), 2))
        for column in ("env_steps", "resets", "labels", "seconds"):
            taken = np.mean(values(method, "forward", steps, column)) if steps else 0
            line.append(f"{taken / 60:.0f}" if column == "seconds" else f"{taken:,.0f}")
        lines.append(line)
    for who in ("expert", "demonstrate"):
        (row,) = [r for r in rows if r["method"] == who]
        lines.append([who, f"{float(row['success']):.2f}", f"{float(row['mean_steps']):.1f}", *["-"] * 5])
    head = ["", "success", "steps", "prior tasks", "steps of practice", "resets", "labels", "minutes"]
    return table(head, lines)


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/three-ways"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/three-ways-pilot")
        cfg.seeds, cfg.env_steps, cfg.episodes = min(cfg.seeds, 1), min(cfg.env_steps, 1200), 4
        cfg.every = cfg.env_steps // 4
    if cfg.env_steps % cfg.every:
        raise UserError(f"--every {cfg.every}: must divide --env-steps {cfg.env_steps}")
    runs.mkdir(parents=True, exist_ok=True)
    rows, of_seed = Rows(out / "three_ways.csv"), {}
    for seed in range(cfg.seeds):
        of_seed[seed] = practise(cfg, runs, seed)
        for method, folder in of_seed[seed].items():
            for steps in range(0, cfg.env_steps + 1, cfg.every):
                at, checkpoint = (folder, f"steps{steps}") if steps else (runs / f"stage1-s{seed}", "policy")
                if method == "iRe-VLA" and steps == cfg.env_steps:
                    checkpoint = "policy"  # behind the supervised stage, which takes no steps
                taken = (
                    cost(method, folder, steps)
                    if steps
                    else dict.fromkeys(("env_steps", "resets", "labels"), 0)
                )
                for task in ("forward", "prior") if steps in (0, cfg.env_steps) else ("forward",):
                    key = {"method": method, "seed": seed, "task": task, "steps": steps}
                    how = (at, checkpoint, task, cfg.episodes, seed)
                    rows.measure(key, lambda h=how, t=taken: fresh_success(*h) | {"seconds": 0.0} | t)
    for who in ("expert", "demonstrate"):
        key = {"method": who, "seed": 0, "task": "forward", "steps": 0}
        rows.measure(key, lambda who=who: script("forward", who, cfg.episodes))
    draw(rows.rows, of_seed, cfg).savefig(out / "three_ways.png")
    plt.close("all")
    told = summary(rows.rows, cfg)
    print(told)
    if not cfg.pilot:
        put(PAGE, "three ways", told)


if __name__ == "__main__":
    cli(Config, main)
