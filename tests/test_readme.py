"""What the pages claim is so: commands parse, the paper map and the tags agree, tables and files are the code's.

A test that looks for something asserts that it found it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import shlex
import statistics
from pathlib import Path

import pytest
import tyro

import eval as evaluation
import pointmass
import stage0
import stage1
import stage2

ROOT = Path(stage1.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
SCRIPTS = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "eval": evaluation, "pointmass": pointmass}
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("envs/*.py")), ROOT / "tests" / "test_stage2.py"]
TAG = re.compile(r"\[(?:Eq|Alg|L_)[^\]]*\]")
DIARY = "docs/lab.md"  # its commands are those of their day


# --- commands ---------------------------------------------------------------------------------------------------------
def commands() -> list[tuple[str, str, str]]:
    """(where, script, arguments) of every `python X.py ...` in the pages and at the top of the scripts."""
    texts = {where: text for where, text in PAGES.items() if where != DIARY}
    for name, script in SCRIPTS.items():
        source = Path(script.__file__).read_text()
        texts[f"{name}.py"] = script.__doc__ or "\n".join(re.match(r"((?:#.*\n|\n)*)", source)[1].splitlines())
    found = []
    for where, text in texts.items():
        for script, args in re.findall(r"\bpython (?:-u )?(\w+)\.py([^`\n&|;)]*)", text):  # up to the next command
            args = re.split(r"\s+#", args)[0]  # a comment
            found.append((where, script, args.strip().rstrip(".,:")))
    return found


COMMANDS = commands()


def test_every_script_has_commands():
    assert {script for where, script, _ in COMMANDS if where == f"{script}.py"} == set(SCRIPTS)
    assert {"stage1", "stage2", "pointmass", "eval"} <= {script for where, script, _ in COMMANDS if where == "README.md"}
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


def test_scripts_in_folders_exist():
    found = [name for where, text in PAGES.items() if where != DIARY for name in re.findall(r"python (\w+/\w+\.py)", text)]
    assert "results/collect.py" in found
    for name in found:
        assert (ROOT / name).exists(), name


def test_the_test_command_installs_what_the_tests_need():
    command = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.S)[1]
    requirements = re.findall(r"-r (\S+)", command)
    assert requirements and all((ROOT / r).exists() for r in requirements)
    assert re.search(r"python -m pytest\b", command)


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "True" in capsys.readouterr().out  # a script succeeds


def test_flags_in_the_prose_exist():
    """Every `--flag` in backticks is one of some script, where the code is not another program's."""
    fields = {f.name.replace("_", "-") for s in SCRIPTS.values() for f in dataclasses.fields(s.Config)}
    others = r"(git|pip|torchrun --help|python -m|python \w+/|grep|ruff|tensorboard|jupytext|pytest)\b"
    found = 0
    for where in ("README.md", "docs/results.md", "docs/scale.md", "docs/deviations.md"):
        for code in quoted(re.sub(r"```.*?```|<!-- collected.*?<!-- end -->", "", PAGES[where], flags=re.S)):
            if re.match(others, code):
                continue
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code.replace("--nproc_per_node", "")):
                assert flag in fields or flag.removeprefix("no-") in fields, f"{where}: {code}"
                found += 1
    assert found > 20


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
    assert {"[L_BC]", "[L_steps_to_go]", "[Eq. 1]", "[Eq. 2]", "[Eq. 3]"} <= set(FOUND)
    assert {f"[Alg. 1, line {n}]" for n in (1, 2, 4, 5, 7, 8)} <= set(FOUND)


@pytest.mark.parametrize("tag", FOUND)
def test_every_tag_has_a_row_in_the_paper_map(tag):
    assert tag in {t for row in MAP for t in quoted(row[1])}


@pytest.mark.parametrize("row", MAP, ids=[row[1].strip("`") for row in MAP])
def test_the_tagged_line_computes_what_its_row_says(row):
    _, tag, words, places = row
    (tag,) = quoted(tag)
    assert quoted(words) and quoted(places)
    for place in quoted(places):
        file, name = place.split(":")
        lines = [line for source in function(ROOT / file, name) for line in source.splitlines() if tag in line]
        assert lines, f"{tag} is not in {place}"
        for line in lines:
            code = line.split("#")[0]
            assert any(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", code) for word in quoted(words)), line


@pytest.mark.parametrize("row", MAP, ids=[row[1].strip("`") for row in MAP])
def test_every_row_of_the_paper_map_names_all_files_with_its_tag(row):
    named = {place.split(":")[0] for place in quoted(row[3])}
    here = {p.relative_to(ROOT).as_posix() for p in SOURCES if quoted(row[1])[0] in tags(p)}
    assert here - {"tests/test_stage2.py"} == named - {"tests/test_stage2.py"}


def test_the_reading_list_is_all_scripts_with_their_lines():
    rows = {name.rstrip("/"): row for row in table("file") for name in quoted(row[0])}
    for name in rows:
        assert (ROOT / name).exists(), name
    assert {p.name for p in ROOT.glob("*.py")} <= rows.keys()
    counted = {name: int(row[1]) for name, row in rows.items() if row[1]}
    assert len(counted) >= 8
    for name, lines in counted.items():
        true = len((ROOT / name).read_text().splitlines())
        assert abs(true - lines) <= max(10, lines // 10), f"{name} has {true} lines"


def test_links_lead_somewhere():
    found = 0
    for where, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", re.sub(r"<!--.*?-->", "", text, flags=re.S)):
            assert (ROOT / where).parent.joinpath(link).exists(), f"{where}: {link}"
            found += 1
    assert found > 10


def logged() -> set[str]:
    """The keys of the dicts that become a row of Stage 2's metrics.csv: in its `main` and in `counting.metrics`."""
    keys = []
    (main,) = function(ROOT / "stage2.py", "main")
    for node in ast.walk(ast.parse(main)):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", "") == "row" and isinstance(node.value, ast.Dict):
            keys += [key.value for key in node.value.keys]
    (metrics,) = function(ROOT / "common/counting.py", "metrics")
    returned = [n.value for n in ast.walk(ast.parse(metrics)) if isinstance(n, ast.Return) and isinstance(n.value, ast.Dict)]
    assert keys and returned
    return {*keys, *(key.value for value in returned for key in value.keys)}


def test_the_metrics_table_has_what_stage2_logs():
    columns = [name for row in table("column of `metrics.csv`") for name in quoted(row[0])]
    assert len(columns) == len(set(columns))
    assert set(columns) == logged()


def test_curves_draws_columns_that_are_logged():
    (source,) = function(ROOT / "common" / "pictures.py", "curves")
    drawn = {"env_steps", *re.findall(r'\("[^"]*", "(\w+)"\)', source)}
    assert len(drawn) > 4 and drawn <= logged()


def test_gradients_are_clipped_where_the_metrics_table_says():
    text = " ".join(cell for row in table("column of `metrics.csv`") for cell in row)
    (said,) = re.findall(r"clipping at ([\d.]+)", text)
    (source,) = function(ROOT / "stage2.py", "main")
    (done,) = re.findall(r"clip_grad_norm_\(.*?, ([\d.]+)\)", source)
    assert float(said) == float(done)


# --- prose ------------------------------------------------------------------------------------------------------------
def prose(page: str) -> list[str]:
    """A page's lines without code, tables, comments and pictures."""
    page = re.sub(r"```.*?```|<!--.*?-->|!\[.*?\]\(.*?\)", "", page, flags=re.S)
    page = re.sub(r"\]\([^)]*\)", "]", page)  # a link's address is not read
    return [line for line in page.splitlines() if line.strip() and not line.startswith(("|", "#"))]


def sentences(page: str) -> list[str]:
    text = re.sub(r"`[^`]*`", "CODE", "\n".join(re.sub(r"^(\d+\.|-) ", "\n\n", line) for line in prose(page)))
    return [s for s in re.split(r"(?<=[.:;!?])\s+|\n\n", text) if re.search(r"\w", s)]


def test_the_readme_is_short_and_plain():
    lines, told = README.splitlines(), sentences(README)
    assert len(lines) <= 200 and len(told) > 40
    assert max(map(len, lines)) <= 110
    assert max(len(line) for line in lines if line.startswith("|")) <= 100
    assert statistics.median(len(s.split()) for s in told) <= 20
    for sentence in told:
        assert len(sentence.split()) <= 40, sentence
        assert sentence.count("(") <= 1, sentence
        assert len(re.findall(r"(?<![\w.])\d[\d.,]*", sentence)) <= 3, sentence


def test_the_readme_names_no_commit_no_machine_and_no_target():
    text = "\n".join(prose(README)) + "\n".join(line for line in README.splitlines() if line.startswith("|"))
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", text)
    assert not re.findall(r"\b(AVX\S*|H200|A100|Xeon|GiB|bars?|missed)\b", text)


def test_the_diary_is_dated_and_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", PAGES[DIARY], re.M)
    assert len(dates) > 20 and dates == sorted(dates, reverse=True)
    assert len(re.findall(r"^## .*", PAGES[DIARY], re.M)) == len(dates)
    assert "(negative)" in PAGES[DIARY]


def test_deviations_name_code_that_exists():
    rows = re.findall(r"^\d+\. .*", PAGES["docs/deviations.md"], re.M)
    places = re.findall(r"`((?:\w+/)*\w+\.py)(?::(\w+))?`", PAGES["docs/deviations.md"])
    assert len(rows) > 15 and len(places) > 15
    for file, name in places:
        assert (ROOT / file).exists(), file
        source = (ROOT / file).read_text()
        assert not name or re.search(rf"\b{name}\b", source), f"{file}:{name}"
