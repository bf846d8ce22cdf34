"""What a flag may be: bounds by type, defaults, rules; and what a stage's setup makes of them."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated

import pytest

import eval as evaluation
import stage0
import stage1
import stage2
from common import UserError, options
from common.options import Count, Positive, Share, Size, Whole, Within

CONFIGS = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "eval": evaluation}


@dataclass
class Config:
    steps: Count = 1
    seed: Whole = 0
    threshold: Size | None = None
    rate: Positive | None = None
    gamma_now: Share = 0.5
    odd: Annotated[int, "of another library", Within(2, 4)] = 3
    name: str | None = None


def test_what_is_within_its_bounds_is_accepted():
    options.check(Config())
    options.check(Config(steps=1, seed=0, threshold=0.0, rate=1e-9, gamma_now=0.0, odd=2, name="x"))
    options.check(Config(steps=10**9, threshold=1e9, rate=1e9, gamma_now=1.0, odd=4))


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("steps", 0, "--steps 0: must be at least 1"),
        ("seed", -1, "--seed -1: must be at least 0"),
        ("threshold", -0.1, "--threshold -0.1: must be at least 0"),
        ("threshold", math.nan, "--threshold nan: must be at least 0"),
        ("threshold", math.inf, "--threshold inf: must be at least 0"),
        ("rate", 0.0, "--rate 0.0: must be at least 1e-09"),
        ("gamma_now", 1.01, "--gamma-now 1.01: must be between 0 and 1"),
        ("gamma_now", math.nan, "--gamma-now nan: must be between 0 and 1"),
        ("odd", 5, "--odd 5: must be between 2 and 4"),
    ],
)
def test_what_is_beyond_its_bounds_is_named(field, value, complaint):
    with pytest.raises(UserError) as e:
        options.check(Config(**{field: value}))
    assert str(e.value) == complaint


def bounds(kind: object) -> list[Within]:
    """The bounds in a field's type, None allowed or not."""
    kinds = [kind, *typing.get_args(kind)]
    return [b for k in kinds for b in getattr(k, "__metadata__", ()) if isinstance(b, Within)]


@pytest.mark.parametrize("script", CONFIGS.values(), ids=CONFIGS)
def test_every_number_of_the_scripts_has_bounds(script):
    """Or a rule of its own in common/setup.py."""
    own = {"episodes", "batch", "data_fraction"} if script is stage1 else set()
    hints = typing.get_type_hints(script.Config, include_extras=True)
    numbers = set()
    for field in dataclasses.fields(script.Config):
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        kinds += [getattr(kind, "__origin__", None) for kind in kinds]
        if {int, float} & {kind for kind in kinds if isinstance(kind, type)}:
            numbers.add(field.name)
    assert len(numbers) >= 4 and own <= numbers
    assert numbers - own == {name for name, kind in hints.items() if bounds(kind)}


def test_fill_gives_none_its_default_and_nothing_else():
    cfg = Config(threshold=0.0, name="")
    options.fill(cfg, {"threshold": 3.0, "rate": 1e-3, "name": "x"})
    assert cfg == Config(threshold=0.0, rate=1e-3, name="")
    with pytest.raises(AttributeError):
        options.fill(cfg, {"nothing": 1})


def test_must_complains_of_the_first_rule_that_does_not_hold():
    options.must([(True, "a"), (1, "b"), ("yes", "c")])
    with pytest.raises(UserError, match="^b$"):
        options.must([(True, "a"), (0, "b"), (False, "c")])


def test_flag():
    assert options.flag("eval_every") == "--eval-every" and options.flag("lr") == "--lr"
