"""The success threshold that Stage 1 measures, and the average of the weights that it keeps."""

from __future__ import annotations

import copy

import pytest
import torch

from common.average import Average
from stage1 import calibrate


def test_the_largest_threshold_that_is_precise_enough():
    final = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    before = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.95, 0.85])
    # up to 0.8 all are right; from 0.85 on one is early, from 0.95 on another
    assert calibrate(before, final, 1.0) == pytest.approx((0.8, 1.0, 0.8))
    assert calibrate(before, final, 0.85) == pytest.approx((0.9, 0.9, 1.0))
    assert calibrate(before, final, 0.8) == pytest.approx((1.0, 0.8, 1.0))


def test_a_threshold_between_two_well_separated_clusters_takes_all():
    generator = torch.Generator().manual_seed(0)
    final, before = torch.rand(500, generator=generator), 2 + torch.rand(500, generator=generator)
    s, precision, recall = calibrate(before, final, 0.85)
    assert 1 < s < 3 and precision >= 0.85 and recall == 1
    # more than 15 % of the earliest alarms would be wrong above it
    assert (before <= s).float().mean() == pytest.approx(0.15, abs=0.01)


def test_where_nothing_is_precise_the_best_guess_says_so():
    s, precision, recall = calibrate(torch.tensor([1.0, 1.0, 5.0]), torch.tensor([2.0, 2.0, 3.0]), 0.85)
    assert s == 3.0 and precision == pytest.approx(1 / 3) and recall == 1


def test_a_precise_threshold_that_misses_nearly_all_is_not_taken():
    final = torch.tensor([0.1, *[2.0] * 9])
    before = torch.tensor([5.0, *[5.0] * 7, 1.0, 1.0])
    # at 0.1 the only alarm is right, and nine arrivals are missed; at 2 two alarms are early, eight are right
    assert calibrate(before, final, 0.9, 0.1) == pytest.approx((0.1, 1.0, 0.1))
    assert calibrate(before, final, 0.9, 0.2) == pytest.approx((2.0, 0.8, 1.0))


def test_by_default_nine_in_ten_are_right_and_a_fifth_is_caught():
    """Ten arrivals: k of them at a small d; the rest only at one where two alarms are early."""
    for k, s in ((1, 2.0), (3, 0.1)):
        final = torch.tensor([*[0.1] * k, *[2.0] * (10 - k)])
        before = torch.tensor([*[5.0] * 8, 1.0, 1.0])
        assert calibrate(before, final)[0] == pytest.approx(s)


def test_average_is_the_exponential_average_and_resumes_exactly():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, by_hand = Average(model, 0.9), model.weight.detach().clone()
    for n in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        by_hand = decay * by_hand + (1 - decay) * model.weight.detach()
        if n == 100:
            other = copy.deepcopy(model)
            resumed = Average(other, 0.9)
            resumed.load_state_dict(copy.deepcopy(average.state_dict()))
            assert resumed.updates == 100 and torch.equal(resumed.average["weight"], average.average["weight"])
    torch.testing.assert_close(average.average["weight"], by_hand)
    assert set(average.average) == {"weight"}, "what is not trained has no average"

    now = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), by_hand)
    assert torch.equal(model.weight, now), "training goes on from the weights themselves"


def test_no_average():
    model = torch.nn.Linear(3, 2)
    average, now = Average(model, 0.0), model.weight.detach().clone()
    average.update()
    with average.applied():
        assert torch.equal(model.weight, now)
