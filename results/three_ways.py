"""Three ways to practise, one task, one budget: ours, iRe-VLA and RoboFuME, side by side.

    python results/three_ways.py                        # hours: trains what is not in runs/ yet, measures, draws
    python results/three_ways.py --seed 1               # one seed of it, without the figure: for one of two processes
    python results/three_ways.py --methods irevla       # or some of the methods
    python results/three_ways.py --robofume-seeds 1     # all, but RoboFuME with this seed alone
    python results/three_ways.py --pilot                # the same in tiny, to see that all of it works

The task: push the red moon to the yellow pentagon. All start from the same Stage 1 policy, which has seen some 80
demonstrations of it among 8,000. Every step of the simulations counts: iRe-VLA's collection, RoboFuME's failures and
its way back. Symmetries are off for all three. Whatever is interrupted goes on when the command is given again. What
has been measured is kept in each run's own measured.csv and is not measured again. Several processes may work at
once: where two need the same run, one waits for the other. At the end, the whole command collects what is there.
A run that is not in runs/ any more keeps its rows of results/three_ways.csv; --anew trains it again.

Writes results/three_ways.csv, three_ways.png, and the table of docs/baselines.md; with other flags of Stage 1, steps or
episodes, the first two in runs/three-ways/ alone.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import measuring  # noqa: E402
from measuring import alone, as_text, finish, logged, once, spread, table, with_interval, write_csv  # noqa: E402

import envs  # noqa: E402 - the repository's root is not installed
import stage1  # noqa: E402
import stage2  # noqa: E402
from baselines import irevla, robofume  # noqa: E402
from common import UserError  # noqa: E402
from common.cli import cli  # noqa: E402
from common.counting import true_success  # noqa: E402
from common.options import Count, Positive, Whole, check  # noqa: E402
from common.pictures import BLUE, GREEN, ORANGE, WIDTH, plt  # noqa: E402
from common.runs import Run, read_json, wilson, write_atomically  # noqa: E402
from common.setup import load_checkpoint, make_env  # noqa: E402

METHODS = {
    "resets": "nanoEFM, resets",
    "operator": "nanoEFM, operator",
    "irevla": "iRe-VLA",
    "robofume": "RoboFuME",
}
COLOURS = dict(zip(METHODS.values(), (BLUE, "#56B4E9", ORANGE, GREEN), strict=True))
PAGE = Path("docs/baselines.md")
COSTS = ("env_steps", "resets", "labels", "seconds")


@dataclass
class Stage1Flags:
    """Of the Stage 1 runs that all methods start from."""

    stage1_model: str | None = None  # None: the domain's
    stage1_episodes: Count = 8000
    stage1_updates: Count = 6000
    stage1_lr: Positive | None = None  # None: the domain's


@dataclass
class Config(Stage1Flags):
    seeds: Count = 3  # seeds 0, 1, ...
    robofume_seeds: tuple[Whole, ...] | None = (
        None  # RoboFuME with these alone, an hour and a half each; None: all
    )
    seed: Whole | None = None  # this one alone, and nothing is drawn
    methods: tuple[Literal["resets", "operator", "irevla", "robofume"], ...] = tuple(
        METHODS
    )  # fewer: nothing is drawn
    env_steps: Count = 100_000  # of practice, for each
    every: Count = 25_000  # steps between two measurements
    episodes: Count = 500  # fresh ones of a measurement
    anew: bool = False  # train what runs/ has not, even if results/three_ways.csv has it
    pilot: bool = False  # everything tiny, in runs/three-ways-pilot/


# --- what results/neighbours.py needs, too ---------------------------------------------------------------------------
def taught(cfg: Any, folder: Path, pairs: str, seed: int) -> Path:
    """The Stage 1 run on demonstrations of the pairs; cfg: Stage1Flags and `pilot`."""
    how = {"episodes": cfg.stage1_episodes, "updates": cfg.stage1_updates}
    how |= {"model": cfg.stage1_model, "lr": cfg.stage1_lr, "seed": seed, "out": str(folder)}
    if cfg.pilot:
        how |= {"episodes": 20, "updates": 20, "eval_every": 20, "eval_episodes": 4}
        pairs = "both"  # among twenty, one in a hundred would not be there
    return finish(stage1.main, stage1.Config(domain=f"tabletop,pairs={pairs}", **how))


@contextlib.contextmanager
def short_episodes(pilot: bool) -> Iterator[None]:
    """Inside, where it is a pilot, episodes of up to four simulations have twelve steps; demonstrations are whole."""
    make_vec = envs.make_vec

    def make_short(domain: str, num_envs: int, **kwargs: Any) -> envs.Domain:
        env = make_vec(domain, num_envs, **kwargs)
        env.horizon = 12 if num_envs <= 4 else env.horizon
        return env

    envs.make_vec = make_short if pilot else make_vec
    try:
        yield
    finally:
        envs.make_vec = make_vec


def measured(folder: Path, checkpoint: str, task: str, episodes: int) -> dict[str, str]:
    """True success and steps of a run's checkpoint at a task, over fresh episodes from reset scenes."""

    def measure() -> dict[str, float]:
        env = make_env(f"tabletop,pairs={task}", 1, obs="state")
        policy = load_checkpoint(folder / f"{checkpoint}.safetensors", env)
        seed = read_json(folder / "config.json")["seed"]
        return true_success(policy, env, episodes, 5 * 10**8 + seed * 10**6)

    return once(
        folder / "measured.csv", {"checkpoint": checkpoint, "task": task, "eval_episodes": episodes}, measure
    )


def put(name: str, text: str) -> None:
    """Write a table between `<!-- NAME -->` and `<!-- end -->` of docs/baselines.md."""
    with alone(Path("runs") / PAGE.name):
        measuring.put(PAGE, name, text)


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


@contextlib.contextmanager
def budget(env_steps: int) -> Iterator[None]:
    """Inside, Stage 2 ends with the iteration that passes so many steps: it counts iterations, which differ in steps."""
    steps = Run.steps

    def until_spent(run: Run, *args: Any) -> Iterator[int]:
        for iteration in steps(run, *args):
            if run.tracked["progress"].env_steps >= env_steps:
                return
            yield iteration

    Run.steps = until_spent
    try:
        yield
    finally:
        Run.steps = steps


def practise(cfg: Config, taught: Path, folder: Path, method: str, seed: int) -> Path:
    """The run of a method; trained if it is not there."""
    start = {"stage1": str(taught), "seed": seed, "out": str(folder)}
    ours = start | {"num_envs": 16}
    irevlas, robofumes = dict(start), dict(start)
    if cfg.pilot:
        ours |= {"updates": 2, "batch": 16, "num_envs": 4, "eval_episodes": 4, "first_look": 4}
        irevlas |= {"tuples": 32, "num_envs": 4, "sl_updates": 4, "eval_episodes": 4, "warmup": 0,
                    "least_successes": 0}  # fmt: skip
        robofumes |= {"failures": 2, "judge_updates": 4, "offline_updates": 4, "batch": 16, "num_envs": 4,
                      "warmup": 0, "eval_episodes": 4}  # fmt: skip
    with snapshots(cfg.every):
        if method in ("resets", "operator"):
            # tuples of an iteration, at least
            tuples = ours.get("updates", 16) * ours.setdefault("batch", 64)
            ours["iterations"] = ours["patience"] = math.ceil(cfg.env_steps / tuples)
            ours["domain"] = f"tabletop,pairs={'both' if method == 'operator' else 'forward'}"
            with budget(cfg.env_steps):
                return finish(stage2.main, stage2.Config(**ours, operator=method == "operator"))
        if method == "irevla":
            # PPO, then what is left of the budget for the successes; an iteration is not cut short, so PPO may take more
            irevlas |= {"env_steps": int(0.8 * cfg.env_steps), "collect_steps": int(0.16 * cfg.env_steps)}
            return finish(irevla.main, irevla.Config(**irevlas, tasks=("tabletop,pairs=forward",)))
        # the operator's own clock, as in the second line of ours
        robofumes |= {"reset_least": 180.0, "reset_most": 300.0, "env_steps": cfg.env_steps}
        return finish(robofume.main, robofume.Config(**robofumes))


def as_published(cfg: Config) -> bool:
    """Whether the flags are those of results/three_ways.csv."""
    defaults = Config()
    flags = (*vars(Stage1Flags()), "env_steps", "every", "episodes", "pilot")
    return all(getattr(cfg, flag) == getattr(defaults, flag) for flag in flags)


def published(cfg: Config, path: Path) -> dict[tuple[str, int], list[dict[str, str]]]:
    """The CSV's rows of earlier runs, by method and seed; none if they were made with other flags, or --anew."""
    rows = {}
    if cfg.anew or not path.exists() or not as_published(cfg):
        return rows
    for row in measuring.read_csv(path):
        rows.setdefault((row["method"], int(row["seed"])), []).append(row)
    return rows


def measurements(cfg: Config, runs: Path, seed: int, before: dict) -> list[dict[str, str]]:
    """The rows of one seed; what is neither in runs/ nor in `published`'s rows is trained and measured."""
    rows = []
    for method in cfg.methods:
        name, folder = METHODS[method], runs / f"{method}-s{seed}"
        if method == "robofume" and cfg.robofume_seeds is not None and seed not in cfg.robofume_seeds:
            continue
        if (name, seed) in before and not folder.exists():
            rows += before[name, seed]
            continue
        start = taught(cfg, runs / f"stage1-s{seed}", "practice", seed)
        practise(cfg, start, folder, method, seed)
        if method == "robofume":  # what it has learnt offline, behind the failures that it was shown
            told = logged(folder)
            steps = int(told[0]["env_steps"])
            shown = [row for row in told if row["env_steps"] == steps][-1]
            taken = cost(name, folder, steps) | {"seconds": shown["seconds"], "precision": math.nan}
            rows += measured_rows(cfg, name, seed, steps, folder, "offline", taken)
        for steps in range(cfg.every, cfg.env_steps + 1, cfg.every):
            # iRe-VLA's last one lies behind the supervised stage, which takes no steps
            at_end = method == "irevla" and steps == cfg.env_steps
            checkpoint = "policy" if at_end else f"steps{steps}"
            taken = cost(name, folder, steps) | {
                "precision": precision(name, folder, steps - cfg.every, steps)
            }
            rows += measured_rows(cfg, name, seed, steps, folder, checkpoint, taken)
    start = runs / f"stage1-s{seed}"
    if ("Stage 1", seed) in before and not start.exists():
        return before["Stage 1", seed] + rows
    taught(cfg, start, "practice", seed)
    nothing = dict.fromkeys(COSTS, 0) | {"precision": math.nan}
    return measured_rows(cfg, "Stage 1", seed, 0, start, "policy", nothing) + rows


def measured_rows(
    cfg: Config, name: str, seed: int, steps: int, folder: Path, checkpoint: str, taken: dict[str, float]
) -> list[dict[str, str]]:
    """A checkpoint's rows: at the task and, before and after practice, at the prior tasks."""
    rows = []
    for task in ("forward", "prior") if steps in (0, cfg.env_steps) else ("forward",):
        key = {"method": name, "seed": seed, "task": task, "steps": steps}
        told = measured(folder, checkpoint, task, cfg.episodes)
        told = {k: v for k, v in told.items() if k not in ("checkpoint", "task")}
        rows.append(as_text(key) | told | as_text(taken))
    return rows


def of_one_model(runs: Path, seeds: int) -> None:
    """Raise UserError if the seeds' Stage 1 models have different sizes: a preset may have changed between them."""
    env, first = make_env("tabletop,pairs=practice", 1, obs="state"), None
    for seed in range(seeds):
        path = runs / f"stage1-s{seed}/policy.safetensors"
        if not path.exists():  # its rows are `published`'s
            continue
        sizes = load_checkpoint(path, env).cfg
        first = first or (seed, sizes)
        if sizes != first[1]:
            raise UserError(
                f"{runs}: Stage 1 of seed {seed} has other sizes than seed {first[0]}'s; move one of them away"
            )


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


def precision(method: str, folder: Path, after: int, until: int) -> float:
    """Of what the judge called done between two numbers of steps, the share that was; nan if it called nothing done.

    Ours says when an episode ends: its shares are weighted by an iteration's alarms. RoboFuME's is asked of each state:
    the mean of its rows. iRe-VLA is told the truth.
    """
    if method == "iRe-VLA":
        return math.nan
    alarms, right, told = 0.0, 0.0, logged(folder)
    for previous, row in zip(told, told[1:], strict=False):
        if not after < row["env_steps"] <= until:
            continue
        if method == "RoboFuME":
            if not math.isnan(row["precision"]):
                alarms += 1
                right += row["precision"]
        else:
            episodes = row["episodes"] - previous["episodes"]
            alarms += episodes * row["detected"]
            right += episodes * (row["detected"] - row["false_positives"])
    return right / alarms if alarms else math.nan


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
            "eval_episodes": episodes}  # fmt: skip


# --- what comes out ---------------------------------------------------------------------------------------------------
def draw(rows: list[dict[str, str]], cfg: Config) -> plt.Figure:
    """Success, steps and the judges' precision over the steps of practice: a thin line a seed, their mean thick."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.3), layout="constrained")
    for method, colour in COLOURS.items():
        for ax, column in zip(axes, ("success", "mean_steps", "precision"), strict=True):
            seeds, at = 0, {}  # number of seeds; thousands of steps -> each seed's value
            for seed in range(cfg.seeds):
                of_seed = [r for r in rows if (r["seed"], r["task"]) == (str(seed), "forward")]
                mine = [r for r in of_seed if r["method"] in ("Stage 1", method)]
                if {r["method"] for r in mine} != {"Stage 1", method}:
                    continue  # not trained with this seed
                points = sorted(
                    (int(r["steps"]) / 1000, float(r[column])) for r in mine if r[column] != "nan"
                )
                if not points:
                    continue  # iRe-VLA has no judge
                seeds += 1
                for x, y in points:
                    at.setdefault(x, []).append(y)
                ax.plot(*zip(*points, strict=True), color=colour, lw=0.6, alpha=0.6)
            # where all its seeds are: RoboFuME's offline learning ends at another number of steps in each
            mean = sorted((x, np.mean(values)) for x, values in at.items() if len(values) == seeds)
            if mean:
                label = method if seeds == cfg.seeds else f"{method} ({seeds})"
                ax.plot(*zip(*mean, strict=True), "o-", color=colour, lw=1.8, ms=3, label=label)
    for who, style in (("expert", "--"), ("demonstrate", ":")):
        (line,) = [r for r in rows if r["method"] == who]
        axes[1].axhline(float(line["mean_steps"]), color="black", ls=style, lw=0.8)
        axes[1].annotate(who, (0, float(line["mean_steps"])), fontsize=8, va="top")
    titles = ("true success", "steps of an episode", "of what is called done: truly done")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="thousand steps of practice", xlim=(0, cfg.env_steps / 1000))
    axes[0].set_ylim(0, 1.02)
    axes[2].set_ylim(0, 1.02)
    title = f"{cfg.seeds} seed{'s' * (cfg.seeds > 1)}"
    fig.legend(
        *axes[0].get_legend_handles_labels(), title=title, loc="outside lower center", ncols=len(COLOURS)
    )
    return fig


def summary(rows: list[dict[str, str]], cfg: Config) -> str:
    """One line a method: at the end of the budget, beside Stage 1's policy and the scripts."""

    def values(method: str, task: str, steps: int, column: str) -> list[float]:
        key = {"method": method, "task": task, "steps": str(steps)}
        return [float(r[column]) for r in rows if key.items() <= r.items()]

    lines = []
    for method, steps in [("Stage 1", 0), *((m, cfg.env_steps) for m in COLOURS)]:
        line = [method, str(len(values(method, "forward", steps, "success")))]
        line += [
            spread(values(method, "forward", steps, c), d) for c, d in (("success", 2), ("mean_steps", 1))
        ]
        line.append(spread(values(method, "prior", steps, "success"), 2))
        for column in COSTS:
            taken = np.mean(values(method, "forward", steps, column))
            line.append(f"{taken / 60:.0f}" if column == "seconds" else f"{taken:,.0f}")
        lines.append(line)
    for who in ("expert", "demonstrate"):
        (row,) = [r for r in rows if r["method"] == who]
        lines.append(
            [who, "-", f"{float(row['success']):.2f}", f"{float(row['mean_steps']):.1f}", *["-"] * 5]
        )
    of_success = ["seeds", "success", "steps", "prior tasks"]
    of_cost = ["steps of practice", "resets", "labels", "minutes"]
    return table(["", *of_success, *of_cost], lines)


def by_seed(rows: list[dict[str, str]], cfg: Config) -> str:
    """Success and its interval, then steps, of each method and seed at the end of the budget."""
    lines = []
    for method, steps in [("Stage 1", 0), *((m, cfg.env_steps) for m in COLOURS)]:
        line = [method]
        for seed in range(cfg.seeds):
            key = {"method": method, "seed": str(seed), "task": "forward", "steps": str(steps)}
            mine = [r for r in rows if key.items() <= r.items()]
            told = f"{with_interval(mine, 'success', 2)}, {float(mine[0]['mean_steps']):.1f}" if mine else "-"
            line.append(told)
        lines.append(line)
    return table(["", *(f"seed {seed}" for seed in range(cfg.seeds))], lines)


def main(cfg: Config) -> None:
    check(cfg)
    runs = Path("runs/three-ways")
    out = Path("results") if as_published(cfg) else runs
    if cfg.pilot:
        runs = out = Path("runs/three-ways-pilot")
        cfg.seeds, cfg.env_steps, cfg.episodes = 1, min(cfg.env_steps, 240), 4
        cfg.every = max(1, cfg.env_steps // 4)
    if cfg.env_steps % cfg.every:
        raise UserError(f"--every {cfg.every}: must divide --env-steps {cfg.env_steps}")
    seeds = range(cfg.seeds) if cfg.seed is None else [cfg.seed]
    chosen = set(seeds if cfg.robofume_seeds is None else cfg.robofume_seeds)
    if not chosen or not chosen <= set(seeds):
        raise UserError(f"--robofume-seeds {sorted(chosen)}: name one or more of the seeds {list(seeds)}")
    rows, before = [], published(cfg, out / "three_ways.csv")
    with short_episodes(cfg.pilot):
        for seed in seeds:
            rows += measurements(cfg, runs, seed, before)
        if cfg.seed is not None or set(cfg.methods) != set(METHODS):
            print("a part of it: the command without --seed and --methods trains and collects all, and draws")
            return
        for who in ("expert", "demonstrate"):
            key = {"method": who, "seed": 0, "task": "forward", "steps": 0}
            of_script = {"who": who, "eval_episodes": cfg.episodes}
            told = once(runs / "scripts.csv", of_script, lambda who=who: script("forward", who, cfg.episodes))
            nothing = dict.fromkeys(COSTS, 0) | {"precision": math.nan}
            rows.append(as_text(key) | {k: v for k, v in told.items() if k != "who"} | as_text(nothing))
    of_one_model(runs, cfg.seeds)
    made = {(row["method"], int(row["seed"])) for row in rows}
    for key, kept in before.items():  # of other seeds than the ones asked for
        if key not in made:
            rows += kept
    columns = list(rows[0])
    write_csv(out / "three_ways.csv", [{k: row[k] for k in columns} for row in rows])
    draw(rows, cfg).savefig(out / "three_ways.png")
    plt.close("all")
    told = summary(rows, cfg)
    print(told)
    if as_published(cfg):
        put("three ways", told)
        put("three ways, by seed", by_seed(rows, cfg))


if __name__ == "__main__":
    cli(Config, main)
