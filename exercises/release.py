"""A copy of the repository for a graded class: `python exercises/release.py OUT`, graded by its own tests.

The functions below are left without their bodies, but for the tags of the paper map.
The solutions of the exercises are left out.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = "tests/test_exercises.py"
FUNCTIONS = {
    "tokens.py": ("SignMagnitude.encode", "SignMagnitude.decode", "StepsToGo.encode"),
    "model.py": ("prefix_mask", "EFM.steps_to_go"),
    "stage2.py": ("rewards", "monte_carlo_returns", "reinforce_loss", "detect_success"),
    "common/counting.py": ("confusion", "confirmed_detections"),
    "pointmass.py": ("rewards", "monte_carlo_returns", "reinforce_loss"),
}


def strip(source: str, names: tuple[str, ...]) -> str:
    """The source with `raise NotImplementedError` behind the docstrings of these functions and methods."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        for inner in [node, *getattr(node, "body", [])]:
            if isinstance(inner, ast.FunctionDef):
                found[inner.name if inner is node else f"{node.name}.{inner.name}"] = inner
    for function in sorted((found[name] for name in names), key=lambda f: -f.lineno):
        first, *rest = function.body
        start = rest[0].lineno - 1 if ast.get_docstring(function) else first.lineno - 1
        tags = re.findall(r"  # \[.*\]", "\n".join(lines[start : function.end_lineno]))
        stub = " " * first.col_offset + "raise NotImplementedError" + "".join(tags)
        lines[start : function.end_lineno] = [stub]
    return "\n".join(lines) + "\n"


def release(out: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if name != SOLUTIONS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes((ROOT / name).read_bytes())
    for name, functions in FUNCTIONS.items():
        (out / name).write_text(strip((ROOT / name).read_text(), functions))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-") or Path(sys.argv[1]).exists():
        sys.exit(print("release.py: name one folder that does not exist yet", file=sys.stderr) or 2)
    release(Path(sys.argv[1]))
    functions = sum(map(len, FUNCTIONS.values()))
    print(f"{sys.argv[1]}: {functions} functions to write; there, `python -m pytest` grades them")
