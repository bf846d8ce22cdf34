"""The benchmark's parts run, in little; what they measure is not looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common import ranks
from model import PRESETS
from tests import benchmark


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(ranks, "sides", 1)


def test_an_update_is_timed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert benchmark.update_seconds("pointmass", "state", 2, 2) > 0
    assert ranks.sides == 2
    assert not list(tmp_path.glob("*/policy.safetensors"))  # it ended there


def test_a_step_beside_transformers(torchvision_ops, capsys):
    benchmark.training(replace(PRESETS["nano-vision"], image_size=32, depth=1), B=2, rounds=1)
    assert "samples" in capsys.readouterr().out


def test_a_rollout_that_keeps_nothing_draws_the_same_tokens(capsys):
    benchmark.rollout("pointmass", "images", steps=2, rounds=1, n=2)
    assert "2 tokens an action" in capsys.readouterr().out
