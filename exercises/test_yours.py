"""Your solutions, checked: `pytest exercises -k ex04`, or `pytest exercises` for all."""

import importlib
from pathlib import Path

import pytest

from exercises import checks

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("ex[0-9]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test(name: str):
    exercise = importlib.import_module(f"exercises.{name}")
    try:
        checks.check(name, exercise)
    except NotImplementedError as missing:
        pytest.fail(f"exercises/{name}.py: still to do. {missing}", pytrace=False)
    except AssertionError as wrong:  # its text is the lesson; where the check stands is not
        pytest.fail(f"exercises/{name}.py: {wrong}", pytrace=False)
