"""results/: the pages have the tables of the raw numbers; what is published stays when its run is gone."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")


def script(name: str):
    """The module results/{name}.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The folders that collect.py works on, without any run."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tables_of_the_pages_are_the_raw_numbers(copy):
    script("collect").main()
    for name in (*PAGES, "results/summaries.csv"):
        assert (copy / name).read_text() == (ROOT / name).read_text(), f"{name}: run python results/collect.py"
    assert "<!-- collected: results -->" in (copy / "README.md").read_text()
    for name in (
        "learning",
        "figure3",
        "figure8",
    ):  # a letter of 8 points on a picture of 830 pixels can be read
        assert 1200 <= Image.open(copy / f"results/{name}.png").width <= 1300


def test_a_row_by_hand():
    """The table's means, computed here once more."""
    runs = {row["run"]: row for row in rows(ROOT / "results" / "summaries.csv")}
    second = [runs[f"tabletop-turned4000-stage2-s{seed}"] for seed in range(3)]
    first = [runs[Path(row["stage1"]).name] for row in second]
    after = [float(row["success"]) for row in second]
    steps = [sum(float(row["mean_steps"]) for row in group) / 3 for group in (first, second)]
    (line,) = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("| tabletop, states")]
    assert f"| {sum(after) / 3:.2f} ({min(after):.2f}-{max(after):.2f}) |" in line
    assert f"| {steps[0]:.1f} → {steps[1]:.1f} |" in line


def test_an_ablation_by_hand():
    seeds = [row for row in rows(ROOT / "results" / "pointmass_ablations.csv") if row["flags"] == "--gamma 1"]
    assert len(seeds) >= 3
    success = sum(float(row["stage2_success"]) for row in seeds) / len(seeds)
    (line,) = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("| `--gamma 1` |")]
    assert f"| {len(seeds)} | {success:.3f} (" in line


def test_collect_adds_and_drops(copy, capsys):
    collect = script("collect")
    kept = {row["run"]: row for row in rows(copy / "results/summaries.csv")}
    old = {k: collect.parse(v) for k, v in kept["tabletop-stage1-s0"].items() if v and k != "run"}
    again = old | {"seconds": 1.5, "success": 0.25}
    for name in ("tabletop-stage1-s0", "tabletop-new-stage1-s7"):
        (copy / "runs" / name).mkdir(parents=True)
        (copy / "runs" / name / "summary.json").write_text(json.dumps(again))
        (copy / "runs" / name / "metrics.csv").write_text("update\n1\n")
    collect.collect()
    now = {row["run"]: row for row in rows(copy / "results/summaries.csv")}
    gone = {name for name, row in kept.items() if row["stage1"].endswith("/tabletop-stage1-s0")}
    assert gone and now.keys() == kept.keys() - gone | {"tabletop-new-stage1-s7"}
    assert all(now[name] == kept[name] for name in now.keys() & kept.keys() - {"tabletop-stage1-s0"})
    assert (now["tabletop-stage1-s0"]["success"], now["tabletop-new-stage1-s7"]["seconds"]) == ("0.25", "1.5")
    said = capsys.readouterr().out
    for name in gone:  # not with a Stage 1 that it did not start from
        assert name in said and not (copy / f"results/metrics/{name}.csv").exists()
    assert (copy / "results/metrics/tabletop-new-stage1-s7.csv").read_text() == "update\n1\n"


def test_each_published_practice_has_its_raw_metrics():
    published = [row for row in rows(ROOT / "results" / "summaries.csv") if row["stage"] == "stage2"]
    assert len(published) > 10
    for row in published:
        assert {"env_steps", "true_at_end", "detected", "mean_steps"} <= rows(ROOT / f"results/metrics/{row['run']}.csv")[
            0
        ].keys()
