"""The comparison of three ways to practise and the baselines' tables run from one command; their page is the code's."""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import math
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

import envs
import eval as evaluation
import stage1
from baselines import irevla, robofume
from common import UserError
from common.runs import Run
from envs.tabletop import TabletopVectorEnv
from model import EFMConfig
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/baselines.md").read_text()


def script(name: str):
    """The module results/{name}.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


three_ways = script("three_ways")
own_tables = script("neighbours")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Tiny models, and episodes of twelve steps where a policy acts."""
    with pytest.MonkeyPatch.context() as patch, tiny.tiny_presets():
        horizon = property(lambda self: 12 if vars(self).get("num_envs", 9) <= 4 else 100, lambda self, value: None)
        patch.setattr(TabletopVectorEnv, "horizon", horizon, raising=False)
        patch.setitem(tiny.PRESETS, "nano-deep", dataclasses.replace(tiny.PRESETS["nano-deep"], **tiny.SIZES))
        folder = tmp_path_factory.mktemp("three-ways")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def compared(workplace):
    """The pilot: RoboFuME alone, interrupted in the middle of its practice, then of its measurements; then all."""
    checkpoint, steps, make_vec = Run.checkpoint, Run.steps, envs.make_vec
    stopped, measured, success = [], [], three_ways.true_success

    def stop(run):
        checkpoint(run)
        if "robofume" in run.folder.name and run.tracked["progress"].row == 2:
            stopped.append(run.folder)
            raise KeyboardInterrupt

    def stop_at_the_fourth(policy, env, *args):
        if len(measured) == 3:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(env.name)
        return success(policy, env, *args)

    robofume_alone = {"pilot": True, "methods": ("robofume",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(three_ways, "true_success", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as inner:
            inner.setattr(Run, "checkpoint", stop)
            three_ways.main(three_ways.Config(**robofume_alone))
        assert stopped and not measured
        with pytest.raises(KeyboardInterrupt):
            three_ways.main(three_ways.Config(**robofume_alone))
        # nothing is left of the hooks
        assert (Run.checkpoint, Run.steps, envs.make_vec) == (checkpoint, steps, make_vec)
        folder = workplace / "runs/three-ways-pilot"
        assert sum(len(rows(path)) for path in folder.glob("*/measured.csv")) == 3
        three_ways.main(three_ways.Config(**robofume_alone, seed=0))
        assert not (folder / "three_ways.csv").exists()  # a part of it draws nothing
        three_ways.main(three_ways.Config(pilot=True))
    assert measured.count("interrupted") == 1 and len(measured) == 1 + 2 + 4 * 5 + 1  # none twice, none lost
    return folder


def test_the_pilot_measures_every_method_at_every_point(compared):
    told = rows(compared / "three_ways.csv")
    practised = [r for r in told if r["method"] not in ("expert", "demonstrate")]
    assert {r["method"] for r in practised} == {"Stage 1", *three_ways.COLOURS}
    for method in three_ways.COLOURS:
        points = {(r["task"], int(r["steps"])) for r in practised if r["method"] == method}
        if method == "RoboFuME":  # and behind the failures, before it practises
            shown = int(float(rows(compared / "robofume-s0/metrics.csv")[0]["env_steps"]))
            offline = {p for p in points if p[1] == shown}
            assert 0 < shown < 60 and offline == {("forward", shown)}
            points -= offline
        assert points == {("forward", steps) for steps in (60, 120, 180, 240)} | {("prior", 240)}, method
    start = [(r["task"], r["steps"]) for r in practised if r["method"] == "Stage 1"]
    assert sorted(start) == [("forward", "0"), ("prior", "0")]  # all start from the same policy
    assert len(told) == 2 + 4 * 5 + 1 + 2
    assert (compared / "three_ways.png").stat().st_size > 10_000


def test_robofume_may_have_fewer_seeds(compared):
    """Two seeds, the second of them the first's copy without RoboFuME."""
    told = rows(compared / "three_ways.csv")
    second = [r | {"seed": "1"} for r in told if r["method"] not in ("RoboFuME", "expert", "demonstrate")]
    cfg = three_ways.Config(seeds=2, env_steps=240, every=60, robofume_seeds=(0,))
    fig = three_ways.draw(told + second, cfg)
    lines = [line for line in fig.axes[0].lines if line.get_linewidth() < 1]
    assert len(lines) == 2 * 4 - 1
    counted = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in three_ways.summary(told + second, cfg).splitlines()
    }
    assert (counted["RoboFuME"], counted["iRe-VLA"], counted["Stage 1"], counted["expert"]) == ("1", "2", "2", "-")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in three_ways.by_seed(told + second, cfg).splitlines()}
    first, other = cells["Stage 1"]
    (start,) = [r for r in told if (r["method"], r["task"]) == ("Stage 1", "forward")]
    low, high, steps = (float(start[k]) for k in ("success_low", "success_high", "mean_steps"))
    assert first == other and first.endswith(f" ({low:.2f}-{high:.2f}), {steps:.1f} ")
    assert cells["RoboFuME"][1].strip() == "-" != cells["RoboFuME"][0].strip()


def test_costs_are_counted(compared):
    last = {r["method"]: r for r in rows(compared / "three_ways.csv") if (r["task"], r["steps"]) == ("forward", "240")}
    ours, operator, irevla_, robofume_ = (last[method] for method in three_ways.COLOURS)
    assert int(ours["labels"]) == int(operator["labels"]) == 0 < int(robofume_["labels"])
    assert int(irevla_["labels"]) == int(irevla_["resets"]) > 0
    assert int(operator["resets"]) < int(ours["resets"]) and int(robofume_["resets"]) >= int(robofume_["labels"])
    for method in ("nanoEFM, resets", "nanoEFM, operator", "RoboFuME"):
        assert int(last[method]["env_steps"]) >= 240


def test_copies_are_the_policy_of_their_time(compared):
    """RoboFuME's last round ends at the budget: the last copy is its last policy, the first one is not."""
    for name in ("resets", "operator", "robofume", "irevla"):
        assert len(list((compared / f"{name}-s0").glob("steps*.safetensors"))) >= 3, name
    first, last, policy = ((compared / f"robofume-s0/{n}.safetensors").read_bytes() for n in ("steps60", "steps240", "policy"))
    assert last == policy != first


def test_what_is_published_and_not_in_runs_any_more_is_kept(compared, monkeypatch, tmp_path):
    """Other flags, and --anew, keep nothing; a run that is there goes before its rows."""
    path = compared / "three_ways.csv"
    before = three_ways.published(three_ways.Config(), path)
    assert {method for method, _ in before} == {*three_ways.COLOURS, "Stage 1", "expert", "demonstrate"}
    for flags in ({"anew": True}, {"pilot": True}, {"stage1_updates": 7}, {"episodes": 4}, {"every": 50_000}):
        assert three_ways.published(three_ways.Config(**flags), path) == {}
    assert three_ways.published(three_ways.Config(), tmp_path / "three_ways.csv") == {}
    trained = []
    monkeypatch.setattr(three_ways, "taught", lambda cfg, folder, *_: folder)
    monkeypatch.setattr(three_ways, "practise", lambda *args: trained.append(args[3]))
    monkeypatch.setattr(three_ways, "measured_rows", lambda cfg, name, *_: [{"method": name, "new": "yes"}])
    monkeypatch.setattr(three_ways, "cost", lambda *_: {})
    monkeypatch.setattr(three_ways, "precision", lambda *_: 1.0)
    (tmp_path / "irevla-s0").mkdir()
    told = three_ways.measurements(three_ways.Config(), tmp_path, 0, before)
    assert trained == ["irevla"] and {r["method"] for r in told if "new" in r} == {"iRe-VLA"}
    kept = [r for r in rows(path) if r["method"] not in ("iRe-VLA", "expert", "demonstrate")]
    assert sorted(map(str, kept)) == sorted(str(r) for r in told if "new" not in r)


def test_a_judges_precision_by_hand(monkeypatch):
    log = [
        {"env_steps": 5, "episodes": 7, "detected": 1.0, "false_positives": 1.0, "precision": 0.9},  # before the first
        {"env_steps": 10, "episodes": 17, "detected": 0.5, "false_positives": 0.5, "precision": 0.2},
        {"env_steps": 20, "episodes": 27, "detected": 0.5, "false_positives": 0.1, "precision": math.nan},
        {"env_steps": 30, "episodes": 57, "detected": 0.8, "false_positives": 0.2, "precision": 0.4},
        {"env_steps": 40, "episodes": 60, "detected": 0.0, "false_positives": 0.0, "precision": math.nan},
    ]
    monkeypatch.setattr(three_ways, "logged", lambda folder: log)

    def told(method: str, after: int, until: int) -> float:
        return three_ways.precision(method, Path(), after, until)

    assert told("nanoEFM, resets", 10, 30) == pytest.approx((4 + 18) / (5 + 24))
    assert told("nanoEFM, resets", 0, 30) == pytest.approx((0 + 4 + 18) / (5 + 5 + 24))
    assert told("RoboFuME", 0, 30) == pytest.approx(0.3)
    for method, after, until in (("nanoEFM, resets", 30, 40), ("RoboFuME", 30, 40), ("iRe-VLA", 0, 30)):
        assert math.isnan(told(method, after, until))


def test_what_is_there_is_not_trained_or_measured_again(compared, monkeypatch):
    before = (compared / "three_ways.csv").read_bytes()

    def never(*_, **__):
        raise AssertionError("again")

    monkeypatch.setattr(Run, "start", never)
    for name in ("true_success", "script"):
        monkeypatch.setattr(three_ways, name, never)
    three_ways.main(three_ways.Config(pilot=True))
    assert (compared / "three_ways.csv").read_bytes() == before


def test_a_run_of_other_settings_is_not_taken_for_the_wanted_one(compared):
    with pytest.raises(UserError, match="stage1-s0: was started with --lr 0.002, this is 0.005"):
        three_ways.main(three_ways.Config(pilot=True, stage1_lr=5e-3))


def test_seeds_of_different_sizes_are_not_averaged(monkeypatch, tmp_path):
    """A preset that changed keeps its name: the checkpoints' sizes tell."""
    widths = {tmp_path / f"stage1-s{seed}/policy.safetensors": width for seed, width in enumerate((64, 64, 128))}
    for path in widths:
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(three_ways, "load_checkpoint", lambda path, env: SimpleNamespace(cfg=EFMConfig(width=widths[path])))
    three_ways.of_one_model(tmp_path, 2)
    with pytest.raises(UserError, match="Stage 1 of seed 2 has other sizes than seed 0's"):
        three_ways.of_one_model(tmp_path, 3)
    (tmp_path / "stage1-s2/policy.safetensors").unlink()  # its rows were published
    three_ways.of_one_model(tmp_path, 3)


def test_ours_stops_where_the_budget_is_spent(compared):
    for name in ("resets", "operator"):
        told = [int(row["env_steps"]) for row in rows(compared / f"{name}-s0/metrics.csv")]
        assert told[-2] < 240 <= told[-1]


def test_stage_1s_settings_are_flags(monkeypatch):
    """None is the domain's; both scripts start from the same runs."""
    asked = []
    for module in (three_ways, own_tables):
        monkeypatch.setattr(module, "finish", lambda main, cfg: asked.append(cfg) or Path(cfg.out))
    monkeypatch.setattr(three_ways, "measured", lambda *_: {})
    monkeypatch.setattr(own_tables, "measured", lambda *_: {})
    monkeypatch.setattr(own_tables, "judge_rates", lambda folder: {})
    flags = {"stage1_model": "nano-wide", "stage1_updates": 7, "stage1_lr": 2e-3, "episodes": 1}
    fewer = three_ways.Config(**flags, methods=("robofume",), robofume_seeds=(0,))
    rows_of = three_ways.measurements(fewer, Path("runs/three-ways"), 1, {})
    assert {r["method"] for r in rows_of} == {"Stage 1"}
    own_tables.of_robofume(own_tables.Config(**flags), Path("runs/neighbours"), Path("runs/three-ways"), 1)
    first, second = (cfg for cfg in asked if isinstance(cfg, stage1.Config))
    assert first == second and (first.model, first.episodes, first.updates, first.lr) == ("nano-wide", 8000, 7, 2e-3)
    assert (first.domain, first.seed, first.out) == ("tabletop,pairs=practice", 1, "runs/three-ways/stage1-s1")
    (of_robofume,) = (cfg for cfg in asked if isinstance(cfg, robofume.Config))  # ablations are of seed 0 alone
    assert of_robofume.stage1 == first.out
    three_ways.taught(three_ways.Config(), Path("runs/x"), "prior", 0)
    assert (asked[-1].model, asked[-1].updates, asked[-1].lr) == (None, 6000, None)


def test_the_second_process_waits(tmp_path):
    """A lock on the same run is not given twice; on another run it is."""
    begun, order = threading.Event(), []

    def second():
        with three_ways.alone(tmp_path / "other"):
            begun.set()
        with three_ways.alone(tmp_path / "run"):
            order.append("second")

    with three_ways.alone(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        assert begun.wait(10)
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_measurement_is_made_once(tmp_path):
    made = []
    for key in ({"a": 1}, {"a": 2}, {"a": 1}):
        row = three_ways.once(tmp_path / "measured.csv", key, lambda: made.append(0) or {"b": len(made) / 4})
        assert row == {"a": str(key["a"]), "b": {1: "0.25", 2: "0.5"}[key["a"]]}
    assert len(made) == 2 == len(rows(tmp_path / "measured.csv"))


@pytest.mark.parametrize("name", ["irevla", "robofume"])
def test_eval_evaluates_and_films_the_runs(compared, name, monkeypatch):
    folder = compared / f"{name}-s0"
    monkeypatch.setattr(evaluation, "SHOWN", 4)
    evaluation.main(evaluation.Config(run=str(folder), episodes=4))
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["eval_episodes"] == 4 and 0 <= told["success"] <= 1
    for picture in ("trajectories.png", "steps_to_go.png", "curves.png", "episodes.gif"):
        assert (folder / picture).stat().st_size > 1000, picture


@pytest.mark.slow
def test_the_baselines_own_tables(workplace, capsys, monkeypatch):
    chosen = ("our detector as reward", "no prior data")
    monkeypatch.setattr(own_tables, "ABLATIONS", {name: own_tables.ABLATIONS[name] for name in chosen})
    monkeypatch.setattr(own_tables, "VARIANTS", {name: own_tables.VARIANTS[name] for name in ("iRe-VLA", "PPO-Replay")})
    own_tables.main(own_tables.Config(pilot=True, papers=("robofume",), seed=0))  # as one of two processes
    folder = workplace / "runs/neighbours-pilot"
    assert not list(folder.glob("*.csv"))
    own_tables.main(own_tables.Config(pilot=True))
    assert not (workplace / "results").exists() and not (workplace / "docs").exists()
    first, second = rows(folder / "irevla.csv"), rows(folder / "robofume.csv")
    assert len(first) == (1 + 2 * 4) * 5 and len(second) == (1 + 3 * 2) * 3
    judged = [r for r in second if r["precision"] != "nan"]
    assert {r["checkpoint"] for r in judged} == {"policy"} and {r["name"] for r in judged} == {
        "RoboFuME",
        "our detector as reward",
    }
    said = capsys.readouterr().out
    assert "| PPO-Replay | task2_sl |" in said and "| our detector as reward | practice |" in said
    assert "| no prior data | offline |" in said and "| no prior data | practice |" not in said


def test_variants_and_ablations_are_flags():
    for flags in own_tables.VARIANTS.values():
        assert irevla.Config(**flags)
    for flags in own_tables.ABLATIONS.values():
        assert robofume.Config(**flags) != robofume.Config()
    names = {"true reward", "our detector as reward", "no cloning term", "CQL", "no prior data"}
    assert names == set(own_tables.ABLATIONS)


def test_a_budget_that_is_not_cut_evenly_and_no_seed_of_robofume_are_refused(workplace):
    with pytest.raises(UserError, match="--every 30000: must divide --env-steps 100000"):
        three_ways.main(three_ways.Config(every=30_000))
    for given, told in (((), r"\[\]"), ((0, -1), r"\[-1, 0\]"), ((0, 7), r"\[0, 7\]")):
        with pytest.raises(UserError, match=rf"--robofume-seeds {told}: name one or more of the seeds \[0, 1, 2\]"):
            three_ways.main(three_ways.Config(robofume_seeds=given))
    with pytest.raises(UserError, match=r"seeds \[5\]"):
        three_ways.main(three_ways.Config(seed=5, robofume_seeds=(1,)))
    assert not (workplace / "runs/three-ways").exists()


def test_a_table_by_hand():
    told = three_ways.table(["a", "b"], [["1", "2"]])
    assert told == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert three_ways.spread([0.5], 2) == "0.50" and three_ways.spread([0.5, 0.7, 0.6], 2) == "0.60 (0.50-0.70)"


def test_put_writes_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\nc\n")
    monkeypatch.setattr(three_ways, "PAGE", page)
    monkeypatch.chdir(tmp_path)
    three_ways.put("one", "new")
    assert page.read_text() == "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\nc\n"
    for mark in ("three ways", "irevla", "robofume"):  # what the scripts fill
        assert PAGE.count(f"<!-- {mark} -->") == 1


# --- the page ---------------------------------------------------------------------------------------------------------
TAG = re.compile(r"\[(?:iRe-VLA|RoboFuME) [^\]]*\]")
FILES = {"baselines/irevla.py": irevla, "baselines/robofume.py": robofume}


def table_of(first: str) -> list[list[str]]:
    """The rows of the page's tables whose header starts with the cell `first`."""
    found = []
    for block in re.findall(rf"^\| *{re.escape(first)} *\|.*\n\|[-| :]+\|\n((?:\|.*\n?)*)", PAGE, re.M):
        found += [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
    assert found, first
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_tag_is_in_the_map_and_computes_what_its_row_says():
    mapped = set()
    for _, tag, words, places in table_of("paper"):
        (tag,), (place,) = quoted(tag), quoted(places)
        file, name = place.split(":")
        source = (ROOT / file).read_text()
        nodes = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == name]
        lines = [line for n in nodes for line in source.splitlines()[n.lineno - 1 : n.end_lineno] if tag in line]
        assert lines, f"{tag} is not in {place}"
        for line in lines:
            code = line.split("#")[0]
            assert code.strip() and any(word in code for word in quoted(words)), line
        mapped.add((file, tag))
    tagged = {(file, tag) for file in FILES for tag in TAG.findall((ROOT / file).read_text())}
    assert len(tagged) > 14 and mapped == tagged


@pytest.mark.parametrize("file", FILES)
def test_commands_parse(file):
    module, found = FILES[file], 0
    for args in re.findall(rf"python {re.escape(file)}([^`\n&|;)]*)", module.__doc__ + PAGE):
        args = re.split(r"\s+#", args)[0].strip()
        if "{" in args:
            continue
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(module.Config, args=shlex.split(args))
        found += 1
    assert found >= 5


@pytest.mark.parametrize("module", [irevla, robofume])
def test_the_page_has_every_setting_and_every_column(module):
    section = PAGE[PAGE.index(f"## {'iRe-VLA' if module is irevla else 'RoboFuME'}") :]
    section = section[: section.index("\n## ", 5)]
    names = {code for row in section.splitlines() if row.startswith("|") for code in quoted(row.split("|")[1])}
    columns = {"row", "env_steps", "episodes", "seconds"}
    columns |= {*irevla.RL_COLUMNS, *irevla.SL_COLUMNS, "task"} if module is irevla else {*robofume.COLUMNS, "updates"}
    assert columns <= names, columns - names
    shared = {f.name for f in dataclasses.fields(irevla.ScaleFlags)}
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(module.Config) if f.name not in shared}
    assert flags <= names, flags - names
    for row in section.splitlines():  # and the defaults are the code's
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if row.startswith("| `--") and len(cells) >= 3 and re.fullmatch(r"[\d.,e-]+", cells[1]):
            (flag,) = quoted(cells[0])
            default = getattr(module.Config(), flag.removeprefix("--").replace("-", "_"))
            assert float(cells[1].replace(",", "")) == pytest.approx(float(default)), row


def test_the_files_are_short():
    for file, most in (("baselines/irevla.py", 330), ("baselines/robofume.py", 350)):
        source = (ROOT / file).read_text()
        assert len(source.splitlines()) <= most and max(map(len, source.splitlines())) <= 120
        (main,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "main"]
        assert main.end_lineno - main.lineno < 90
    assert len((ROOT / "baselines/plumbing.py").read_text().splitlines()) <= 160


def test_no_published_number_without_its_csv():
    """The page says "not yet" as long as the CSVs are not there."""
    for mark, name in (("three ways", "three_ways"), ("irevla", "irevla"), ("robofume", "robofume")):
        (block,) = re.findall(rf"<!-- {mark} -->\n(.*?)\n<!-- end -->", PAGE, re.S)
        if (ROOT / f"results/{name}.csv").exists():
            assert "| " in block and "Not yet" not in block
        else:
            assert block.startswith("Not yet")


def test_means_are_of_seeds():
    told = [{"name": "x", "checkpoint": "policy", "v": str(v)} for v in (1.0, 3.0)] + [{"name": "y", "v": "9"}]
    assert np.mean(own_tables.seeds_of(told, "v", name="x")) == 2
