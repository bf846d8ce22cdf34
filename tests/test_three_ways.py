"""The comparison of three ways to practise and the baselines' tables run from one command; their page is the code's."""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

import eval as evaluation
from baselines import irevla, robofume
from common import UserError
from common.runs import Run
from envs.tabletop import TabletopVectorEnv
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
    """The pilot, interrupted in the middle of RoboFuME's practice and begun again."""
    checkpoint, stopped = Run.checkpoint, []

    def stop(run):
        checkpoint(run)
        if "robofume" in run.folder.name and run.tracked["progress"].row == 2:
            stopped.append(run.folder)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "checkpoint", stop)
        three_ways.main(three_ways.Config(pilot=True, env_steps=240))
    assert stopped and Run.checkpoint is checkpoint  # nothing is left of the copies' hook
    three_ways.main(three_ways.Config(pilot=True, env_steps=240))
    return workplace / "runs/three-ways-pilot"


def test_the_pilot_measures_every_method_at_every_point(compared):
    told = rows(compared / "three_ways.csv")
    practised = [r for r in told if r["method"] not in ("expert", "demonstrate")]
    assert {r["method"] for r in practised} == set(three_ways.COLOURS)
    for method in three_ways.COLOURS:
        points = {(r["task"], int(r["steps"])) for r in practised if r["method"] == method}
        want = {("forward", steps) for steps in (0, 60, 120, 180, 240)} | {("prior", 0), ("prior", 240)}
        assert points == want, method
    assert {r["method"]: r["success"] for r in told if r["task"] == "forward" and r["steps"] == "0"}.keys() >= {"expert"}
    before = {r["success"] for r in practised if (r["task"], r["steps"]) == ("forward", "0")}
    assert len(before) == 1  # all start from the same policy
    assert (compared / "three_ways.png").stat().st_size > 10_000


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


def test_what_is_there_is_not_trained_or_measured_again(compared, monkeypatch):
    before = (compared / "three_ways.csv").read_bytes()

    def never(*_, **__):
        raise AssertionError("again")

    for module in (three_ways.stage1, three_ways.stage2, irevla, robofume):
        monkeypatch.setattr(module, "main", never)
    monkeypatch.setattr(three_ways, "true_success", never)
    three_ways.main(three_ways.Config(pilot=True, env_steps=240))
    assert (compared / "three_ways.csv").read_bytes() == before


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
    monkeypatch.setattr(own_tables, "PILOT_STEPS", 80)
    chosen = ("CQL", "no prior data")
    monkeypatch.setattr(own_tables, "ABLATIONS", {name: own_tables.ABLATIONS[name] for name in chosen})
    monkeypatch.setattr(own_tables, "VARIANTS", {name: own_tables.VARIANTS[name] for name in ("iRe-VLA", "PPO-Replay")})
    own_tables.main(own_tables.Config(pilot=True))
    folder = workplace / "runs/neighbours-pilot"
    first, second = rows(folder / "irevla.csv"), rows(folder / "robofume.csv")
    assert len(first) == (1 + 2 * 4) * 5 and len(second) == (1 + 3 * 2) * 3
    judged = [r for r in second if r["precision"] != "nan"]
    assert {r["checkpoint"] for r in judged} == {"policy"} and {r["name"] for r in judged} == {"RoboFuME", "CQL"}
    said = capsys.readouterr().out
    assert "| PPO-Replay | task2_sl |" in said and "| CQL | practice |" in said
    assert "| no prior data | offline |" in said and "| no prior data | practice |" not in said


def test_variants_and_ablations_are_flags():
    for flags in own_tables.VARIANTS.values():
        assert irevla.Config(**flags)
    for flags in own_tables.ABLATIONS.values():
        assert robofume.Config(**flags) != robofume.Config()
    assert {"true reward", "no cloning term", "CQL", "no prior data"} == set(own_tables.ABLATIONS)


def test_a_budget_that_is_not_cut_evenly_is_refused(workplace):
    with pytest.raises(UserError, match="--every 30000: must divide --env-steps 100000"):
        three_ways.main(three_ways.Config(every=30_000))
    assert not (workplace / "runs/three-ways").exists()


def test_a_table_by_hand():
    told = three_ways.table(["a", "b"], [["1", "2"]])
    assert told == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert three_ways.spread([0.5], 2) == "0.50" and three_ways.spread([0.5, 0.7, 0.6], 2) == "0.60 (0.50-0.70)"


def test_put_writes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\nc\n")
    three_ways.put(page, "one", "new")
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
    for file, most in (("baselines/irevla.py", 330), ("baselines/robofume.py", 460)):
        source = (ROOT / file).read_text()
        assert len(source.splitlines()) <= most and max(map(len, source.splitlines())) <= 120
        (main,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "main"]
        assert main.end_lineno - main.lineno < 90


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
