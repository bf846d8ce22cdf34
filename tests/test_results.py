"""results/: what is published stays when its runs are gone, and never with a Stage 1 that it did not start from; the control."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np

import envs
from envs.tabletop import STRIDE, Meaning

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    """The module results/{name}.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_geometric_control_counts_the_steps_of_two_straight_ways():
    env = envs.make_vec("tabletop", 2)
    env.reset(seed=3)
    block, target = 0, 1
    for i in range(2):
        env.tasks.assign(i, Meaning("block2block", block, target), env.pos[i])
    env.pos[:, block], env.pos[:, target] = (0.30, 0.0), (0.42, 0.0)  # 12 cm to go, along x
    env.tool[:] = (0.30 - env.reach, 0.0), (0.30 - env.reach, 0.09)  # behind the block, and 9 cm beside that
    np.testing.assert_allclose(script("gradient").geometric_d(env), [0.12 / STRIDE, (0.12 + 0.09) / STRIDE], rtol=1e-6)


def test_collect_keeps_adds_and_drops(tmp_path, monkeypatch, capsys):
    collect = script("collect")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", "results")
    collect.main()
    for name in ("summaries.csv", "table.md"):  # nothing in runs/: everything as it was
        assert Path("results", name).read_text() == (ROOT / "results" / name).read_text()

    with open("results/summaries.csv", newline="") as f:
        kept = {row["run"]: row for row in csv.DictReader(f)}
    again = {k: collect.parse(v) for k, v in kept["tabletop-stage1-s0"].items() if v and k != "run"} | {
        "seconds": 1.5,
        "success": 0.25,
    }
    for name in ("tabletop-stage1-s0", "tabletop-new-stage1-s7"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "summary.json").write_text(json.dumps(again))
        Path("runs", name, "metrics.csv").write_text("update\n1\n")
    collect.main()
    with open("results/summaries.csv", newline="") as f:
        now = {row["run"]: row for row in csv.DictReader(f)}
    gone = {name for name, row in kept.items() if row["stage1"].endswith("tabletop-stage1-s0")}
    assert gone and now.keys() == kept.keys() - gone | {"tabletop-new-stage1-s7"}
    assert all(now[name] == kept[name] for name in now.keys() & kept.keys() - {"tabletop-stage1-s0"})
    assert (now["tabletop-stage1-s0"]["success"], now["tabletop-new-stage1-s7"]["seconds"]) == ("0.25", "1.5")
    said = capsys.readouterr().out
    assert all(name in said for name in gone)
    assert Path("results/metrics/tabletop-new-stage1-s7.csv").read_text() == "update\n1\n"
