"""Exercise 14: a reward that keeps learning. 10 minutes, and one of computing.

Place: Section 3.2, "a frozen Stage 1 checkpoint". More data should make d better, one may think.
Here it goes on learning L_steps_to_go, from the episodes of practice that it ended itself.
Fewer, the same, or more steps to the goal than with the frozen one? Same is within 5/4.

    python exercises/practice.py ex14 --seed 0
    pytest exercises -k ex14

Who decides where an episode ends, and who learns from that?
"""

import torch
import torch.nn.functional as F

from pointmass import HORIZON, bin_of

PREDICTION = ""  # fewer, same or more


def rollout(plain, agent, reward_model, n, rng, ends):
    """pointmass.rollout, behind which the reward model learns: (obs, steps until its own detection)."""
    episodes = plain(agent, reward_model, n, rng, ends)
    ended = episodes["valid"].sum(1) < HORIZON  # (n,)
    chosen = episodes["valid"] & ended[:, None]  # (n, T)
    left = episodes["valid"].flip(1).cumsum(1).flip(1)[chosen]
    obs, label = episodes["obs"][chosen], bin_of(left, len(reward_model.edges))
    reward_model.requires_grad_(True)
    optimizer = torch.optim.Adam(reward_model.distance.parameters(), lr=3e-4)
    with torch.enable_grad():
        for i in torch.randperm(len(obs), generator=rng).split(64):
            optimizer.zero_grad()
            F.cross_entropy(reward_model.distance(obs[i]), label[i]).backward()
            optimizer.step()
    return episodes


VARIANTS = {"d keeps learning": {"rollout": rollout}}
