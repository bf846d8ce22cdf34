"""What the scripts that train, measure and tabulate share: runs that go on, rows that stay, tables between marks."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stage0
import stage1
import stage2
from common import UserError, demos
from common.counting import detector_confusion, true_success
from common.demos import Demonstrations, split
from common.options import must
from common.runs import read_json, write_atomically
from common.setup import load_run
from envs import Domain
from model import EFM
from tokens import StepsToGo


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process works at what the path is of; the second one waits. Ends with the process, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    def write(path: Path) -> None:
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}


def once(path: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """The row with this key of a CSV; if it is not there, it is measured and appended."""
    key = as_text(key)
    with alone(path):
        rows = read_csv(path) if path.exists() else []
        for row in rows:
            if key.items() <= row.items():
                return row
        row = key | as_text(measure())
        write_csv(path, [*rows, row])
    print(path.parent.name, *(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def finish(main: Callable[[Any], None], cfg: Any) -> Path:
    """The folder of the run, trained to its end; where it is finished its flags are compared, and that is all."""
    folder = Path(cfg.out)
    if hasattr(cfg, "iterations") and (folder / "config.json").exists():
        before = read_json(folder / "config.json")["iterations"]
        if before != cfg.iterations:  # Stage 2 would go on, and what was measured be gone
            raise UserError(
                f"{folder}: has --iterations {before}, this is {cfg.iterations}; move it away first"
            )
    with alone(folder):
        cfg.resume = folder.exists()
        main(cfg)
    return folder


def logged(folder: Path) -> list[dict[str, float]]:
    """A run's metrics.csv."""
    return [{k: float(v) for k, v in row.items()} for row in read_csv(folder / "metrics.csv")]


def ranking(x: np.ndarray) -> np.ndarray:
    """The place of each number in order, from 1 on; equal ones share the mean of theirs. float (n,)."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[which]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks; NaN where one of them never changes."""
    if a.min() == a.max() or b.min() == b.max():
        return math.nan
    return float(np.corrcoef(ranking(a), ranking(b))[0, 1])


@torch.no_grad()
def predicted(
    reward_model: EFM, demonstrations: Demonstrations, rows: np.ndarray, steps: StepsToGo
) -> np.ndarray:
    """d of some rows of demonstrations, float (M,)."""
    d = []
    for part in np.array_split(rows, len(rows) // 512 + 1):
        obs, _, goals, _ = demonstrations.batch(part, reward_model.device)
        d.append(reward_model.steps_to_go(obs, goals, steps).cpu().numpy())
    return np.concatenate(d)


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def put(page: Path, name: str, text: str) -> None:
    """Write a table between `<!-- NAME -->` and `<!-- end -->` of a page."""
    whole, mark = page.read_text(), f"<!-- {name} -->"
    before, after = whole.split(mark)
    _, after = after.split("<!-- end -->", 1)
    page.write_text(f"{before}{mark}\n{text}\n<!-- end -->{after}")


def spread(values: list[float], digits: int) -> str:
    """The mean, and the least and the greatest of several seeds."""
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low}-{high})" if len(values) > 1 else mean


def with_interval(rows: list[dict[str, str]], column: str, digits: int) -> str:
    """The mean, and the least and the greatest of several seeds; of one seed its 95 % interval, where it has one.

    A row without a number, such as the precision of a detector that never fires, is left out.
    """
    with_number = [row for row in rows if not math.isnan(float(row[column]))]
    if not with_number:
        return "none"
    if len(with_number) == 1 and f"{column}_low" in with_number[0]:
        row = with_number[0]
        mean, low, high = (f"{float(row[k]):.{digits}f}" for k in (column, f"{column}_low", f"{column}_high"))
        return f"{mean} ({low}-{high})"
    return spread([float(row[column]) for row in with_number], digits)


def seeds_told(seeds: int) -> str:
    """What the brackets of `with_interval` are."""
    if seeds == 1:
        return "Seed 0 alone; in brackets its 95 % interval."
    return f"Seeds 0 to {seeds - 1}; in brackets the least and the greatest."


# --- what banana.py, families.py, figure4.py and real2sim.py share ----------------------------------------------------
TINY_PRACTICE = {"updates": 1, "batch": 8, "num_envs": 2, "first_look": 2}  # of Stage 2 in a pilot


def require_shares(shares: tuple[float, ...], episodes: int) -> None:
    """Raise UserError, before anything is trained, if --shares are none, twice the same, or leave too little."""
    must([
        (shares, "--shares: name at least one"),
        (len(set(shares)) == len(shares), "--shares: one comes twice"),
    ])  # fmt: skip
    for share in shares:
        try:
            split(episodes, share)
        except UserError as e:
            raise UserError(str(e).replace("--data-fraction", "--shares")) from None


def chosen(rows: list[dict[str, str]], **key: Any) -> list[dict[str, str]]:
    """The rows with this key, of every seed."""
    return [row for row in rows if as_text(key).items() <= row.items()]


def before_and_after(
    imitated: Path, practised: Path, env: Domain, episodes: int, seed: int
) -> dict[str, float]:
    """True success and steps of both policies in a domain, the same scenes for both; how long practice took."""
    told = {}
    for name, run in (("stage1", imitated), ("stage2", practised)):
        _, policy, _ = load_run(run, 1)
        counted = true_success(policy, env, episodes, 7 * 10**8 + seed * 10**6)
        told |= {f"{name}_{k}": v for k, v in counted.items() if k != "eval_episodes"}
    return told | {"practice_episodes": read_json(practised / "summary.json")["episodes"]}


def judged(taught: Path, env: Domain, episodes: int, demonstrations: int, seed: int) -> dict[str, float]:
    """How a Stage 1 run's d and detector do in a domain, which need not be its own.

    rank_correlation: of d with the steps truly left, on fresh demonstrations; precision, recall: of the detector, in
    episodes of its own policy, NaN where it never fires or nothing is ever reached.
    """
    _, policy, reward_model = load_run(taught, 1)
    recorded = demos.record(env.name, env.obs, demonstrations, 10**3 + seed)  # not those of Stage 1
    fresh = demos.Demonstrations(recorded, np.arange(demonstrations), env.state_dim)
    d = predicted(reward_model, fresh, np.arange(len(fresh.index)), StepsToGo(env.steps_cap, env.steps_bins))
    told = {"rank_correlation": rank_correlation(d, fresh.steps.numpy().astype(float))}
    s = read_json(taught / "summary.json")["success_threshold"]
    counted = detector_confusion(policy, reward_model, env, episodes, 8 * 10**8 + seed * 10**6, s)
    ended = counted["true_positives"] + counted["false_positives"]
    reached = counted["true_positives"] + counted["false_negatives"]
    told["precision"] = counted["precision"] if ended else math.nan
    return told | {"recall": counted["recall"] if reached else math.nan}


# what a table says of both policies, and of Stage 1's d and detector: digits
JUDGED = {
    "stage1_success": 2,
    "stage2_success": 2,
    "stage1_mean_steps": 1,
    "stage2_mean_steps": 1,
    "rank_correlation": 2,
    "precision": 2,
    "recall": 2,
}
JUDGED_HEAD = ["Stage 1", "practice", "steps", "steps after", "rank correlation", "precision", "recall"]


def cells(rows: list[dict[str, str]], columns: dict[str, int]) -> list[str]:
    """Of one line of a table: `with_interval` of columns, each with its digits."""
    return [with_interval(rows, column, digits) for column, digits in columns.items()]


def taught_and_practised(
    cfg: Any, name: str, seed: int, seen: dict[str, Any], taught_in: str, practised_in: str
) -> tuple[Path, Path]:
    """From images: the Stage 1 run in a domain and the Stage 2 run in another, trained if they are not there.

    name: of the three runs, before their stage and seed; seen: flags of Stage 0, which they start from.
    """
    tiny0, tiny1, tiny2 = {}, {}, {}
    if cfg.pilot:
        tiny0 = {"batch": 6, "eval_every": seen["updates"]}
        tiny1 = {"batch": 9, "eval_every": cfg.updates}
        tiny2 = TINY_PRACTICE
    init = finish(stage0.main, stage0.Config(**seen | tiny0, seed=seed, out=f"{name}-stage0-s{seed}"))
    of_stage1 = {"domain": taught_in, "obs": "images", "init": str(init), "seed": seed}
    of_stage1 |= {k: getattr(cfg, k) for k in ("episodes", "updates", "eval_episodes")}
    taught = finish(stage1.main, stage1.Config(**of_stage1 | tiny1, out=f"{name}-stage1-s{seed}"))
    of_stage2 = {"stage1": str(taught), "domain": practised_in}
    of_stage2 |= {k: getattr(cfg, k) for k in ("iterations", "eval_episodes")}
    return taught, finish(stage2.main, stage2.Config(**of_stage2 | tiny2, out=f"{name}-stage2-s{seed}"))


def publish(page: Path, name: str, told: str, seeds: int, picture: str) -> None:
    """A table, what its brackets are, and a picture, between the marks of a page."""
    put(page, name, f"{told}\n\n{seeds_told(seeds)}\n\n{picture}")
