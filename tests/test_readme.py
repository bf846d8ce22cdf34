"""What the prose claims is so: commands parse, the paper map and the tags agree, files, columns and defaults are the code's."""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import io
import re
import shlex
from pathlib import Path

import pytest
import tyro

import envs
import eval as evaluation
import pointmass
import stage0
import stage1
import stage2

ROOT = Path(stage1.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "eval": evaluation, "pointmass": pointmass}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("envs/*.py")])
TAG = re.compile(r"\[(?:Eq|Alg|L_)[^\]]*\]")


# --- commands ---------------------------------------------------------------------------------------------------------
def commands() -> list[tuple[str, str, str]]:
    """(where, script, arguments) of every `python X.py ...` in the README, in results/ and at the top of the scripts."""
    texts = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "README.md", *sorted(ROOT.glob("results/*.md")))}
    for name, script in SCRIPTS.items():
        source = Path(script.__file__).read_text()
        texts[f"{name}.py"] = script.__doc__ or "\n".join(re.match(r"((?:#.*\n|\n)*)", source)[1].splitlines())
    found = []
    for where, text in texts.items():
        for script, args in re.findall(r"\bpython (?:-u )?(\w+)\.py([^`\n&|;)]*)", text):  # up to the next command
            args = re.split(r"\s+#", args)[0]  # a comment
            found.append((where, script, args.strip().rstrip(".,")))
    return found


COMMANDS = commands()


def test_every_script_has_commands():
    assert {script for where, script, _ in COMMANDS if where == f"{script}.py"} == set(SCRIPTS)
    assert {"stage1", "stage2", "pointmass"} <= {script for where, script, _ in COMMANDS if where == "README.md"}
    for script in SCRIPTS:
        assert len({args for where, s, args in COMMANDS if where == f"{script}.py" and s == script}) >= 2


@pytest.mark.parametrize(("where", "script", "args"), COMMANDS, ids=[f"{w}-{s}-{i}" for i, (w, s, _) in enumerate(COMMANDS)])
def test_commands_parse(where, script, args):
    assert script in SCRIPTS, f"{where}: there is no {script}.py"
    if re.search(r"@\w+@|\.\.\.|[{<$]|\b[A-Z]{3,}\b", args):
        pytest.skip("a template, not a command")
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            cfg = tyro.cli(SCRIPTS[script].Config, args=shlex.split(args))
    except SystemExit:
        pytest.fail(f"{where}: python {script}.py {args}\n{error.getvalue()}")
    for flag in re.findall(r"--([\w-]+)", args):  # it is parsed as a field of its own
        assert flag.removeprefix("no-").replace("-", "_") in {f.name for f in dataclasses.fields(cfg)}


def test_the_test_command_installs_what_the_tests_need():
    command = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.S)[1]
    requirements = re.findall(r"-r (\S+)", command)
    assert requirements and all((ROOT / r).exists() for r in requirements)
    assert re.search(r"python -m pytest\b", command)


# --- tables -----------------------------------------------------------------------------------------------------------
def table(first: str) -> list[list[str]]:
    """The rows of the README's table whose header starts with the cell `first`."""
    block = re.search(rf"^\| *{re.escape(first)} *\|.*\n\|[-| :]+\|\n((?:\|.*\n?)*)", README, re.M)
    assert block, f"no table that starts with {first}"
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block[1].splitlines()]
    assert rows
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def function(path: Path, name: str) -> list[str]:
    """The source of each function or method of this name in a file."""
    source = path.read_text()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    lines = source.splitlines()
    return ["\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes]


def tags(path: Path) -> set[str]:
    return set(TAG.findall(path.read_text()))


MAP = table("paper")
FOUND = sorted({tag for path in SOURCES for tag in tags(path)})


def test_the_core_equations_are_tagged():
    assert {"[L_BC]", "[L_steps_to_go]", "[Eq. 1]", "[Eq. 2]"} <= set(FOUND)
    assert any(tag.startswith("[Alg. 1") for tag in FOUND)


@pytest.mark.parametrize("tag", FOUND)
def test_every_tag_has_a_row_in_the_paper_map(tag):
    assert tag in {t for row in MAP for t in quoted(row[1])}


@pytest.mark.parametrize("row", MAP, ids=[row[1].strip("`") for row in MAP])
def test_every_row_of_the_paper_map_is_in_the_code(row):
    _, tag, places, tests = row
    assert len(quoted(tag)) == 1 and quoted(places) and quoted(tests)
    for place in quoted(places):
        file, name = place.split(":")
        assert (ROOT / file).exists(), place
        assert any(quoted(tag)[0] in source for source in function(ROOT / file, name)), f"{tag} is not in {place}"
    for file in quoted(tests):
        assert (ROOT / file.split(":")[0]).exists(), file


@pytest.mark.parametrize("row", MAP, ids=[row[1].strip("`") for row in MAP])
def test_every_row_of_the_paper_map_names_all_files_with_its_tag(row):
    named = {place.split(":")[0] for place in quoted(row[2])}
    assert {p.relative_to(ROOT).as_posix() for p in SOURCES if quoted(row[1])[0] in tags(p)} == named


def test_every_file_of_the_files_table_exists():
    files = [name for row in table("file") for name in quoted(row[0])]
    assert len(files) > 5
    for name in files:
        assert (ROOT / name).exists(), name
    listed = {name.rstrip("/") for name in files}
    assert {p.name for p in ROOT.glob("*.py")} <= listed  # and no script is left out
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    for link in links:
        assert (ROOT / link).exists() or link.startswith("results/"), link  # results/ is filled by the runs


def logged(script) -> list[str]:
    """The keys of `row = {...}` and `row |= {...}` in a script's `main`."""
    (main,) = [
        n for n in ast.parse(Path(script.__file__).read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "main"
    ]
    (row,) = [n.value for n in ast.walk(main) if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "row"]
    more = [n.value for n in ast.walk(main) if isinstance(n, ast.AugAssign) and getattr(n.target, "id", "") == "row"]
    return [k.value for d in (row, *more) for k in d.keys]


def test_the_metrics_table_has_what_stage2_logs():
    columns = [name for row in table("column of `metrics.csv`") for name in quoted(row[0])]
    assert len(columns) == len(set(columns))
    assert set(columns) == set(logged(stage2))


def test_curves_draws_columns_that_are_logged():
    source = function(ROOT / "eval.py", "curves")[0]
    drawn = {"env_steps", *re.findall(r'\("[^"]*", "(\w+)"\)', source)}
    assert len(drawn) > 4 and drawn <= set(logged(stage2))


# --- numbers in the prose ---------------------------------------------------------------------------------------------
def test_the_paper_on_one_page_is_at_most_300_lines():
    assert len((ROOT / "pointmass.py").read_text().splitlines()) <= 300


def test_line_counts_in_the_prose():
    for file, lines in re.findall(r"`(\w+\.py)`[^.|\n]{0,60}?\b(\d+) lines", README):
        assert len((ROOT / file).read_text().splitlines()) <= int(lines), file


def test_defaults_in_the_metrics_table_are_those_of_stage2():
    """`s = 3` and the like: what is healthy is said of the defaults."""
    text = " ".join(cell for row in table("column of `metrics.csv`") for cell in row)
    defaults = {f.name: f.default for f in dataclasses.fields(stage2.Config)}
    defaults |= stage2.USUAL | {"s": envs.make_vec("pointmass", 1).success_threshold}
    claims = re.findall(r"\b(s|gamma|c|γ) ?(?:=|<=) ?(\d+(?:\.\d+)?)", text)
    assert claims
    for name, value in claims:
        assert float(value) == defaults[name.replace("γ", "gamma")], f"{name} = {value}"
    clip = re.search(r"clipping at (\d+)", text)
    source = function(ROOT / "stage2.py", "main")[0]
    assert clip and float(clip[1]) == float(re.search(r"clip_grad_norm_\(.*?, ([\d.]+)\)", source)[1])


DEFAULT = re.compile(r"--([a-z][\w-]*)`?[^|\n`]{0,30}\bdefault[^\w\n]*(?:is |: |= )?`?(-?[\d.]+[\de-]*|\w+)`?")


def test_defaults_in_the_prose():
    """`--flag ... default 3`, in README and docstrings: a value of one of the scripts."""
    every: dict[str, set] = {}
    for script in SCRIPTS.values():
        for f in dataclasses.fields(script.Config):
            every.setdefault(f.name, set()).add(str(stage2.USUAL.get(f.name, f.default) if script is stage2 else f.default))
    assert DEFAULT.findall("`--gamma` (default 0.9)") == [("gamma", "0.9")]
    for text in (README, *(s.__doc__ or "" for s in SCRIPTS.values())):
        for flag, value in DEFAULT.findall(text):
            assert value.rstrip(".") in every[flag.replace("-", "_")], (flag, value)


def test_flags_in_the_prose_exist():
    """Every `--flag` in backticks is one of some script, or of git, pip or pytest where the command says so."""
    fields = {f.name.replace("_", "-") for s in SCRIPTS.values() for f in dataclasses.fields(s.Config)}
    for code in quoted(re.sub(r"```.*?```", "", README, flags=re.S)):
        if not re.match(r"(git|pip|torchrun|python -m|grep|ruff|tensorboard)\b", code):
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code):
                assert flag in fields or flag.removeprefix("no-") in fields, code


def test_prose_of_the_configurations():
    """Stage 0 and Stage 1 name their folder in a comment and in the README; common.run_folder makes it."""
    import common

    assert "runs/{domain}-{stage}-s{seed}" in README
    assert common.run_folder("D", "state", "state", "stageN", 7).as_posix() == "runs/D-stageN-s7"


def test_the_results_table_is_the_collected_one():
    table = (ROOT / "results" / "table.md").read_text().strip()
    assert table.count("\n") >= 3
    assert table in README


def test_the_ablation_table_is_the_mean_of_the_raw_rows():
    rows = list(csv.DictReader(io.StringIO((ROOT / "results" / "pointmass_ablations.csv").read_text())))
    for flags in {r["flags"] for r in rows}:
        group = [r for r in rows if r["flags"] == flags]
        success = sum(float(r["stage2_success"]) for r in group) / len(group)
        steps = sum(float(r["stage2_mean_steps"]) for r in group) / len(group)
        line = next(x for x in README.splitlines() if x.startswith(f"| `{flags}` |" if flags else "| default |"))
        assert f"| {len(group)} |" in line and f"{success:.3f} (" in line and f"{steps:.1f} (" in line, line


def test_the_table_of_experts_is_the_raw_rows():
    for row in csv.DictReader(io.StringIO((ROOT / "results" / "experts.csv").read_text())):
        if row["who"] == "expert" and row["domain"] != "pointmass":
            cells = f"| {row['success']} ({row['low']}-{row['high']}) | {row['mean_steps_of_successes']} |"
            settings = dict(x.split("=") for x in row["settings"].split())
            blocks = f"{settings['blocks']} blocks" if "blocks" in settings else ""
            assert any(line.endswith(cells) and row["domain"] in line and settings.get("family", "") in line and blocks in line
                       for line in README.splitlines()), row  # fmt: skip
