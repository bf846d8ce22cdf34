"""Exercise 18: five silent bugs. 30 minutes.

Place: everywhere. None of these versions raises an error; training runs, and is worse.
Read a function here and the one it replaces, say in one sentence what is wrong,
then find a test that fails with the bug and passes without:

    grep -n "^def test" tests/test_stage2.py tests/test_tokens.py tests/test_model.py tests/test_rollout.py
    pytest exercises -k ex18

You will see which kind of test finds such bugs: a number by hand, a sum that must be 1, a picture.
"""

import math

import numpy as np
import torch

TESTS = {  # for example "tests/test_stage2.py::test_rewards"
    "stage2.monte_carlo_returns": "",
    "tokens.StepsToGo.encode": "",
    "model.prefix_mask": "",
    "model.EFM.log_prob": "",
    "common.counting.confirmed_detections": "",
}


def monte_carlo_returns(reward, gamma):
    returns = reward.clone()
    for t in range(reward.shape[1] - 1):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def encode(self, steps):
    return (steps / self.width).round().long().clamp(max=len(self.edges) - 1)[..., None]


def prefix_mask(valid, answers):
    B, P = valid.shape
    T = P + answers
    mask = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    keys = torch.cat([valid, valid.new_ones(B, answers)], 1)
    itself = torch.eye(T, dtype=torch.bool, device=valid.device)
    return (mask & keys[:, None] | itself)[:, None]


def log_prob(self, obs, prompts, answer, ranges, temperature=1.0):
    log_probs = self.log_probs(obs, prompts, answer, ranges)
    total = 0
    for i, (first, _) in enumerate(ranges):
        log_p = (log_probs[i] / temperature).log_softmax(-1)
        total = total + log_p.gather(1, answer[:, i, None] - first)[:, 0] / len(ranges)
    return total


def confirmed_detections(d, truth, threshold):
    confirmed = []
    for i in np.flatnonzero((d <= threshold).any(1)):
        first = int((d[i] <= threshold).argmax())
        confirmed.append(bool(truth[i, : first + math.ceil(threshold) + 1].any()))
    return confirmed
