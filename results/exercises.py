"""What the exercises' predictions are compared with: results/exercises.csv.

    python results/exercises.py --seeds 3    # four minutes a seed on one idle core
    python exercises/practice.py readme      # then the table of exercises/README.md

A row is a run of `exercises/practice.py`: the unchanged one is `python pointmass.py --seed S`.
Rows that are there already stay, so an interrupted run goes on; after a change of pointmass.py remove the file.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from exercises import practice  # noqa: E402 - the repository's root is not installed

COLUMNS = ("exercise", "variant", "seed", "success", "mean_steps", "detected", "seconds")


@dataclass
class Args:
    """Every run of exercises 10 to 17."""

    seeds: int = 3  # seeds 0, 1, ...
    out: Path = practice.CSV  # the table


def main(args: Args) -> None:
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    done = {(row["exercise"], row["variant"], int(row["seed"])) for row in rows}
    runs = [(*key, seed) for seed in range(args.seeds) for key in practice.every_run()]
    for exercise, variant, seed in tqdm([run for run in runs if run not in done], disable=None):
        row = {"exercise": exercise, "variant": variant, "seed": seed}
        rows.append(row | practice.run(practice.every_run()[exercise, variant], seed))
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
