"""The runs of exercises 10 to 17, and what was measured of them.

An exercise's VARIANTS say what changes: fields of `pointmass.Config`, and functions of pointmass.py, whose
replacements get the plain function first. Stage 1 is trained once for each seed and each change of it, and
kept in runs/exercises.

    python exercises/practice.py ex12 --seed 0    # the unchanged run, and the exercise's
    python exercises/practice.py readme           # writes the numbers of results/exercises.csv into README.md
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import inspect
import io
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pointmass  # noqa: E402 - the repository's root is not installed
from common import UserError  # noqa: E402

CSV = ROOT / "results" / "exercises.csv"
CACHE = Path("runs") / "exercises"
OF_STAGE1 = ("episodes", "bins", "stage1_updates", "demonstrate", "bin_of")  # what a change of Stage 1 is
UNCHANGED = ("unchanged", "")  # exercise, variant
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("ex1[0-7]_*.py"))
WORDS = {"mean_steps": ("fewer", "same", "more"), "success": ("none", "some", "all")}


# --- runs ---------------------------------------------------------------------------------------------------
def load(name: str):
    return importlib.import_module(f"exercises.{name}")


def every_run() -> dict[tuple[str, str], dict]:
    """What changes, by exercise and variant."""
    runs = {UNCHANGED: {}}
    for name in NAMES:
        runs |= {(name, variant): changes for variant, changes in load(name).VARIANTS.items()}
    return runs


@contextlib.contextmanager
def patched(changes: dict):
    """Inside, the functions of pointmass.py that `changes` names are the replacements."""

    def replace(owner, attribute: str, new) -> None:
        plain = getattr(owner, attribute)
        stack.enter_context(mock.patch.object(owner, attribute, lambda *args: new(plain, *args)))

    with contextlib.ExitStack() as stack:
        for name, new in changes.items():
            if callable(new):
                *method, attribute = name.split(".")
                replace(getattr(pointmass, method[0]) if method else pointmass, attribute, new)
        yield


def stage1(cfg: pointmass.Config, changes: dict):
    """The agent, its optimiser, s, and the generator behind Stage 1: from the cache, or trained for it."""
    changes = {k: v for k, v in changes.items() if k in OF_STAGE1}
    told = [inspect.getsource(v) if callable(v) else f"{k} {v}" for k, v in changes.items()]
    told = "".join([inspect.getsource(pointmass), *told])  # other code, other file
    path = CACHE / f"stage1-s{cfg.seed}-{zlib.crc32(told.encode()):08x}.pt"
    if not path.exists():
        rng = torch.manual_seed(cfg.seed)
        with patched(changes):
            data = pointmass.demonstrate(cfg.episodes, rng)
            agent = pointmass.Agent(data, cfg.bins)
            optimizer = pointmass.stage1(agent, data, cfg, rng)
        pointmass.evaluate(agent, rng)  # as pointmass.main does: the same random numbers from here on
        kept = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept | {"s": pointmass.calibrate(agent, data)}, path)
    kept = torch.load(path, weights_only=True)
    agent = pointmass.Agent(pointmass.demonstrate(100, torch.Generator()), cfg.bins)
    agent.load_state_dict(kept["agent"])
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    optimizer.load_state_dict(kept["optimizer"])
    rng = torch.manual_seed(0)
    rng.set_state(kept["rng"])
    return agent, optimizer, kept["s"], rng


def run(changes: dict, seed: int) -> dict[str, float]:
    """Practise: success and mean steps of 1000 fresh episodes, and what practice detected at last."""
    start = time.time()
    cfg = pointmass.Config(seed=seed, **{k: v for k, v in changes.items() if not callable(v)})
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        agent, optimizer, s, rng = stage1(cfg, changes)
        s = s if cfg.success_threshold is None else cfg.success_threshold
        with patched(changes):
            rows = pointmass.stage2(agent, optimizer, s, cfg, rng)
        told = pointmass.evaluate(agent, rng)
    row = {"success": told["success"], "mean_steps": told["mean_steps"], "detected": rows[-1]["detected"]}
    return row | {"seconds": round(time.time() - start, 1)}


def main(exercise: tyro.conf.Positional[str], seed: int = 0) -> None:
    """The unchanged run, and the exercise's.

    Args:
        exercise: ex10 ... ex17; or readme, which writes README.md's table
        seed: 0, 1, ... of all runs
    """
    if exercise == "readme":
        write_readme()
        return
    found = [name for name in NAMES if name.startswith(exercise[:4])]
    if len(found) != 1:
        raise UserError(f"exercise {exercise}: choose one of {', '.join(name[:4] for name in NAMES)}")
    module = load(found[0])
    if "" in predictions(module).values():
        raise UserError(f"exercises/{found[0]}.py: write your PREDICTION there first")
    for variant, changes in {"unchanged": {}, **module.VARIANTS}.items():
        row = run(changes, seed)
        print(f"{variant:30}", *(f"{name} {value:.3g}  " for name, value in row.items()))
    print(f"Published: results/exercises.csv. Your prediction: pytest exercises -k {found[0][:4]}")


# --- what was measured --------------------------------------------------------------------------------------
def measured() -> dict[tuple[str, str], list[dict]]:
    """The rows of results/exercises.csv, one a seed, by exercise and variant."""
    if not CSV.exists():
        raise FileNotFoundError(f"{CSV}: missing; `python results/exercises.py --seeds 3` measures it")
    table: dict[tuple[str, str], list[dict]] = {}
    for row in csv.DictReader(CSV.open()):
        table.setdefault((row["exercise"], row["variant"]), []).append(row)
    return table


def mean(rows: list[dict], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def outcome(name: str, variant: str) -> str:
    """The word that a prediction should have been.

    Of mean steps: fewer, same or more than unchanged; same is within a factor of 5/4.
    Of success, where the exercise says MEASURE = "success": none, below 0.05; all, above 0.95; or some.
    """
    table, measure = measured(), getattr(load(name), "MEASURE", "mean_steps")
    value, unchanged = mean(table[name, variant], measure), mean(table[UNCHANGED], measure)
    low, high = (0.8 * unchanged, 1.25 * unchanged) if measure == "mean_steps" else (0.05, 0.95)
    return WORDS[measure][int(value >= low) + int(value > high)]


def predictions(m) -> dict[str, str]:
    """By variant; one PREDICTION is for all of them."""
    given = m.PREDICTION
    return given if isinstance(given, dict) else dict.fromkeys(m.VARIANTS, given)


def span(rows: list[dict], column: str, form: str) -> str:
    values = sorted(float(row[column]) for row in rows)
    return f"{mean(rows, column):{form}} ({values[0]:{form}}-{values[-1]:{form}})"


def readme_table() -> list[str]:
    """The lines of README.md's table of results."""
    lines = ["| exercise | run | seeds | success | mean steps | detected | seconds | prediction |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for (name, variant), rows in measured().items():
        number = name[2:4] if (name, variant) != UNCHANGED else ""
        numbers = [
            span(rows, "success", ".2f"),
            span(rows, "mean_steps", ".0f"),
            f"{mean(rows, 'detected'):.2f}",
        ]
        numbers += [f"{mean(rows, 'seconds'):.0f}", outcome(name, variant) if number else ""]
        lines.append(" | ".join(["| " + number, variant or "unchanged", str(len(rows)), *numbers]) + " |")
    return lines


def write_readme() -> None:
    path = Path(__file__).parent / "README.md"
    before, rest = path.read_text().split("<!-- measured -->\n")
    _, after = rest.split("<!-- end -->\n")
    table = "\n".join(readme_table())
    path.write_text(f"{before}<!-- measured -->\n{table}\n<!-- end -->\n{after}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as wrong:
        sys.exit(print(wrong, file=sys.stderr) or 2)
