"""Devices, threads and rows for several processes, as far as one process can say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from common import UserError, ranks
from common.options import DeviceFlags


@pytest.fixture(autouse=True)
def as_before():
    threads, chosen = torch.get_num_threads(), ranks.chosen
    yield
    torch.set_num_threads(threads)
    ranks.chosen = chosen


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"^--device {name}: there is none here; leave it out$"):
            ranks.choose_device(name)
    ranks.choose_device("cpu")
    assert ranks.device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    ranks.choose_device("mps")
    assert ranks.device() == torch.device("mps")
    ranks.choose_device(None)
    assert ranks.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.device() == torch.device("cuda")
    ranks.choose_device("cpu")
    assert ranks.device() == torch.device("cpu")  # a flag goes before what is there


def test_threads_are_the_flags_else_one_for_a_small_model_and_are_remembered():
    torch.set_num_threads(2)
    for flag, weights, expected in ((None, 10**5, 1), (3, 10**5, 3), (2, 10**9, 2), (None, 10**9, 2)):
        cfg = DeviceFlags(threads=flag)
        ranks.choose_threads(cfg, weights)
        assert cfg.threads == torch.get_num_threads() == expected


def test_one_process_has_all_rows():
    rows, weight = ranks.local_rows(np.arange(5))
    assert rows.tolist() == [0, 1, 2, 3, 4] and weight == 1
    assert ranks.rank() == 0 and ranks.world() == 1 and ranks.all_gather("x") == ["x"]
    assert ranks.mean({"loss": torch.tensor(2.0)}) == {"loss": 2.0}


@pytest.mark.parametrize(("n", "world"), [(7, 2), (8, 2), (1, 2), (5, 3), (2, 3)])
def test_the_ranks_weighted_means_are_the_mean_over_all_rows(n, world, monkeypatch):
    rows, means, seen = np.arange(n) ** 2 + 1.0, [], []
    monkeypatch.setattr(ranks, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        mine, weight = ranks.local_rows(rows)
        means.append(weight * mine.mean())
        seen += mine.tolist() if weight else []
    assert sorted(seen) == rows.tolist()
    assert np.mean(means) == pytest.approx(rows.mean())


def test_what_cannot_be_shared_evenly_is_named(monkeypatch):
    @dataclasses.dataclass
    class Config:
        batch: int = 6
        num_envs: int = 4

    ranks.require_divisible(Config(), "batch", "num_envs")
    monkeypatch.setattr(ranks, "world", lambda: 3)
    ranks.require_divisible(Config(), "batch")
    with pytest.raises(UserError, match="^--num-envs 4: cannot be shared evenly by 3 processes$"):
        ranks.require_divisible(Config(), "batch", "num_envs")


def test_a_clusters_leftover_variable_is_not_torchrun(monkeypatch):
    for name in ranks.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ranks.process_group(several=True):
        assert ranks.world() == 1
    for name in ranks.TORCHRUN:
        monkeypatch.setenv(name, "2")  # all of them, and of more than one process
    with pytest.raises(UserError, match="one process"), ranks.process_group(several=False):
        pass
