"""Devices, threads and rows for several processes, as far as one process can say."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from common import UserError, ranks
from common.options import DeviceFlags, ScaleFlags


@pytest.fixture(autouse=True)
def as_before():
    threads, chosen, sides = torch.get_num_threads(), ranks.chosen, ranks.sides
    yield
    torch.set_num_threads(threads)
    ranks.chosen, ranks.sides = chosen, sides


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


@pytest.mark.parametrize(("cores", "flag", "weights", "threads", "of_each", "sides"), [
    (4, None, 10**5, 2, 1, 2), (1, None, 10**5, 1, 1, 1), (4, 1, 10**5, 1, 1, 1), (4, 2, 10**5, 2, 1, 2),
    (1, 2, 10**5, 2, 1, 2), (4, 5, 10**5, 5, 2, 2), (4, None, 10**9, 4, 4, 1), (4, 2, 10**9, 2, 2, 1)])  # fmt: skip
def test_a_small_model_gets_two_sides_and_the_threads_are_remembered(cores, flag, weights, threads, of_each, sides, monkeypatch):
    monkeypatch.setattr(ranks, "CORES", cores)
    cfg = DeviceFlags(threads=flag)
    ranks.choose_threads(cfg, weights)
    assert (cfg.threads, torch.get_num_threads(), ranks.sides) == (threads, of_each, sides)


def test_where_a_small_model_has_one_side(monkeypatch):
    monkeypatch.setattr(ranks, "CORES", 4)
    for flag in ("compile", "bf16"):
        cfg = ScaleFlags(**{flag: True})
        ranks.choose_threads(cfg, 10**5)
        assert (cfg.threads, ranks.sides) == (1, 1)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    one_of_two = ScaleFlags()
    ranks.choose_threads(one_of_two, 10**5)
    assert (one_of_two.threads, ranks.sides) == (1, 1)
    monkeypatch.setattr(ranks, "world", lambda: 1)
    ranks.chosen = torch.device("cuda")
    on_gpu = ScaleFlags()
    ranks.choose_threads(on_gpu, 10**5)
    assert (on_gpu.threads, ranks.sides) == (1, 1)


@pytest.mark.parametrize("sides", [1, 2])
def test_two_calls_side_by_side(sides):
    ranks.sides = sides
    torch.set_num_threads(3)

    def told(name: str) -> tuple:
        return name, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    (one, first, *how), (other, second, *same) = ranks.side_by_side(lambda: told("one"), lambda: told("other"))
    assert (one, other) == ("one", "other") and how == same == [3, True]
    assert second == threading.get_ident() and (first == second) == (sides == 1)
    with pytest.raises(ZeroDivisionError):
        ranks.side_by_side(lambda: 1 / 0, lambda: told("other"))
    with pytest.raises(ZeroDivisionError):
        ranks.side_by_side(lambda: told("one"), lambda: 1 / 0)


def test_two_sides_have_one_sides_gradient():
    """Of three objectives that share their weights, in double precision; the same bytes each time."""

    class Model(torch.nn.Linear):
        def forward(self, f, *args):
            return f(self, *args)

    torch.manual_seed(0)
    model, data = Model(3, 3).double(), torch.randn(30, 3, dtype=torch.float64)

    def losses(model, data, *rows):
        each = {}
        for power, (name, chosen) in enumerate(zip("abc", rows, strict=True), 1):
            if len(chosen):
                y = torch.nn.functional.linear(data[chosen], model.weight, model.bias)
                each[name] = (y**power).mean() + torch.nn.functional.linear(y, model.weight).mean()
        return each

    rows, found = [np.arange(10), np.arange(10, 15), np.arange(15, 30)], []
    for sides in (1, 2, 2, 2):
        ranks.sides = sides
        model.zero_grad()
        loss = ranks.backward(model, losses, data, rows, False)
        assert list(loss) == ["a", "b", "c"]
        found.append((loss, model.weight.grad.clone(), model.bias.grad.clone()))
    for loss, *gradients in found[1:]:
        assert loss == found[0][0]
        for gradient, one, first in zip(gradients, found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(gradient, one, rtol=1e-12, atol=1e-12)
            assert torch.equal(gradient, first)
    whole = sum(losses(model, data, *rows).values())
    torch.testing.assert_close(list(found[0][1:]), list(torch.autograd.grad(whole, [model.weight, model.bias])))


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
