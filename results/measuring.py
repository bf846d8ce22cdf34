"""What the scripts that train, measure and tabulate share: runs that go on, rows that stay, tables between marks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError
from common.options import flag
from common.runs import read_json, write_atomically


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


class Rows:
    """A CSV of measurements, written row by row; what is in it is not measured again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, read_csv(path) if path.exists() else []

    def measure(self, key: dict[str, Any], what: Callable[[], dict[str, Any]]) -> None:
        """Append key and what was measured, unless a row with the key is there."""
        key = {k: str(v) for k, v in key.items()}
        if any(key.items() <= row.items() for row in self.rows):
            return
        told = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in what().items()}
        print(*key.values(), *(f"{k} {v}" for k, v in told.items()), flush=True)
        self.rows.append(key | told)
        write_csv(self.path, self.rows)


def finish(main: Callable[[Any], None], cfg: Any) -> Path:
    """The folder of the run; trained to its end if it is not there. One of other flags is a UserError."""
    folder = Path(cfg.out)
    if not (folder / "summary.json").exists():
        cfg.resume = folder.exists()
        main(cfg)
        return folder
    before = read_json(folder / "config.json")
    for name, now in json.loads(json.dumps(asdict(cfg))).items():
        if now is not None and name in before and before[name] != now:
            was = f"{folder}: was made with {flag(name)} {before[name]}, this is {now}"
            raise UserError(f"{was}; give the same flags, or delete it")
    return folder


def logged(folder: Path) -> list[dict[str, float]]:
    """A run's metrics.csv."""
    return [{k: float(v) for k, v in row.items()} for row in read_csv(folder / "metrics.csv")]


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
