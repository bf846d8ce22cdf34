"""The house's rules: files that can be read in one sitting, lines that fit on a page, imports in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what a reader reads, in this order, and how long it may be
LINES = {
    "pointmass.py": 300,
    "tokens.py": 140,
    "model.py": 550,
    "stage0.py": 195,
    "stage1.py": 220,
    "stage2.py": 220,
    "rollout.py": 170,
    "eval.py": 160,
}
MAIN, COLUMNS = 80, 110
# a module imports from the rows above its own, and from nothing else of ours
LAYERS = [
    {"tokens", "pointmass", "common", "common.options"},
    {"model", "envs"},
    {"common.weights"},
    {"common.ranks"},
    {"common.runs", "common.cli", "common.average", "common.unimodal"},
    {"common.demos"},
    {"common.setup"},
    {"rollout"},
    {"common.counting"},
    {"stage0", "stage1", "stage2"},
    {"eval"},
    {"baselines", "exercises", "results"},
]
LEAVES = {"baselines", "exercises", "results"}  # nothing imports them; eval is filmed with by results/ alone
ALONE = {"tokens", "pointmass"}


# --- the checkers -------------------------------------------------------------------------------------
def too_wide(text: str) -> list[int]:
    """The numbers of the lines that are too long."""
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


def unformatted(text: str) -> list[int]:
    """The numbers of the lines where the formatter is told to look away."""
    lines = enumerate(text.splitlines(), 1)
    return [i for i, line in lines if "#" in line and ("fmt: skip" in line or "fmt: off" in line)]


def main_lines(text: str) -> int:
    """The lines of `main`, from its `def` to its end."""
    (main,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return main.end_lineno - main.lineno + 1


def imports(text: str, modules: Iterable[str]) -> set[str]:
    """Which of the modules a source text imports, at its top or anywhere inside."""
    modules, found = set(modules), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"line {node.lineno}: a relative import, which this checker does not follow")
        elif isinstance(node, ast.ImportFrom):
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in within]
        else:
            continue
        for name in names:
            parts = name.split(".")
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            found |= set([module for module in known if module in modules][:1])
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or []."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(graph):
        if found := visit(module, []):
            return found
    return []


def floor(module: str) -> int:
    """The row of LAYERS that a module, or its package, is in."""
    for name in (module, module.split(".")[0]):
        for i, layer in enumerate(LAYERS):
            if name in layer:
                return i
    raise ValueError(f"{module}: in no row of LAYERS; put it in one")


def wrong_way(graph: dict[str, set[str]]) -> list[str]:
    """Imports from the same row or a lower one, of a leaf, or of anything by what has to stand alone."""
    wrong = []
    for module, others in graph.items():
        package = module.split(".")[0]
        for other in others:
            same_package = package == other.split(".")[0] and package != "common"
            if (module, other) in ALLOWED:
                continue
            if other.split(".")[0] in LEAVES and not same_package:
                wrong.append(f"{module} imports the leaf {other}")
            elif module in ALONE:
                wrong.append(f"{module} imports {other}, and is to stand alone")
            elif not same_package and floor(other) >= floor(module):
                wrong.append(f"{module} imports {other}, which is not above it")
    return sorted(wrong)


ALLOWED = {
    ("common.options", "common"),  # UserError; the package's own file imports nothing
    ("results.exercises", "exercises.practice"),  # measures what the exercises claim
    ("results.ablations", "exercises.practice"),  # and shares their Stage 1
    *(
        (f"results.{name}", f"baselines{part}")  # they measure the baselines
        for name in ("three_ways", "neighbours")
        for part in ("", ".irevla", ".robofume")
    ),
}


# --- do they find anything? ---------------------------------------------------------------------------
def test_the_checkers_of_lines_can_fail():
    assert too_wide("x" * 110 + "\n" + "x" * 111) == [2]
    skip, off = "fmt: skip", "fmt: off"  # in pieces, as this file is no bad example
    assert unformatted(f"a = 1\nb = 2  # {skip}\n# {off}\nc = 3  # the rest") == [2, 3]
    text = "import x\n\n\ndef main(cfg):\n    a = 1\n\n    return a\n\n\nb = 2\n"
    assert main_lines(text) == 4
    with pytest.raises(ValueError, match="unpack"):
        main_lines("def other():\n    pass\n")


def test_the_checker_of_imports_finds_each_kind():
    modules = {"a", "b", "b.c", "b.d", "e"}
    assert imports("import a\nimport numpy as np\nfrom pathlib import Path", modules) == {"a"}
    assert imports("import b.c", modules) == {"b.c"}
    assert imports("from b import c, Something", modules) == {"b.c", "b"}
    assert imports("from b.d import c", modules) == {"b.d"}
    assert imports("def f():\n    if True:\n        from e import x", modules) == {"e"}
    assert imports("import a.unknown.part", modules) == {"a"}
    assert imports("text = 'import a'", modules) == set()
    with pytest.raises(ValueError, match="line 1: a relative import"):
        imports("from . import c", modules)


def test_the_checker_of_circles_can_fail():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"a"}}) == ["a"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []  # a diamond is none


@pytest.mark.parametrize(
    ("module", "other", "complaint"),
    [
        ("model", "tokens", ""),
        ("stage2", "common.setup", ""),
        ("common.setup", "envs.operator", ""),
        ("envs.tabletop", "envs.domain", ""),
        ("envs.pointmass", "pointmass", ""),
        ("baselines.irevla", "baselines.robofume", ""),
        ("common.options", "common", ""),
        ("results.exercises", "exercises.practice", ""),
        ("tokens", "model", "stand alone"),
        ("pointmass", "common", "stand alone"),
        ("model", "common.weights", "not above"),
        ("common.weights", "common.runs", "not above"),
        ("stage1", "stage2", "not above"),
        ("envs.aloha", "model", "not above"),
        ("common", "common.options", "not above"),
        ("stage2", "eval", "not above"),
        ("results.before_after", "eval", ""),
        ("results.figure2", "exercises.practice", "leaf"),
        ("rollout", "baselines.irevla", "leaf"),
    ],
)
def test_the_checker_of_directions_can_fail(module, other, complaint):
    found = wrong_way({module: {other}})
    assert len(found) == bool(complaint) and complaint in "".join(found)


def test_a_new_module_has_to_find_its_row():
    with pytest.raises(ValueError, match="nowhere: in no row"):
        wrong_way({"stage2": {"nowhere"}})


# --- the house ----------------------------------------------------------------------------------------
def sources() -> dict[str, str]:
    """Every module's source text by its name; the tests are not among them."""
    found = {}
    folders = ["", *{name for layer in LAYERS for name in layer if "." not in name}]
    for folder in folders:
        for path in (ROOT / folder).glob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


@pytest.mark.parametrize("name", LINES)
def test_a_file_on_the_reading_list_fits(name):
    text = (ROOT / name).read_text()
    assert 50 < len(text.splitlines()) <= LINES[name], f"{name} has {len(text.splitlines())} lines"
    assert too_wide(text) == [], f"lines of {name} over {COLUMNS} columns"
    assert unformatted(text) == [], f"lines of {name} that the formatter leaves alone"


@pytest.mark.parametrize("name", ["stage1.py", "stage2.py"])
def test_the_loop_of_a_stage_fits_on_a_screen(name):
    assert 30 < main_lines((ROOT / name).read_text()) <= MAIN


def test_imports_go_one_way():
    texts = sources()
    assert set(LINES) <= {f"{name}.py" for name in texts}
    assert {"common", "common.setup", "envs", "envs.pointmass", "results.collect"} <= texts.keys()
    graph = {name: imports(text, texts) - {name} for name, text in texts.items()}
    assert {"tokens"} <= graph["model"] and {"common.setup", "rollout", "model"} <= graph["stage2"]
    assert wrong_way(graph) == []
    assert circle(graph) == []
