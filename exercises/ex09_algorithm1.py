"""Exercise 9: Algorithm 1 as one piece. 30 minutes.

Place: Algorithm 1, lines 2 to 8, on a bandit: an episode is one step, and one of nine answers.
All parts are given, below and in stage2.py; put them in order. One iteration is:

    2  collect rollouts until there are enough tuples for N updates of B
    4  compute the returns of each rollout (`rewards`, then `monte_carlo_returns` with GAMMA)
    5  place its tuples (obs, answer, R) in a buffer, empty at first
    7  shuffle the buffer; N updates with `reinforce_loss`, of B tuples each, none used twice
    8  drop what is left

    pytest exercises -k ex09

You will see the value of the policy, 0.5 at first, rise above 3 in 60 updates.
"""

import torch
from torch import Tensor, nn

from stage2 import monte_carlo_returns, reinforce_loss, rewards  # noqa: F401 - parts to use

N, B, C, GAMMA = 4, 16, 0.05, 0.9
VALUE = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.0, 4.0, -3.0])  # by how much each answer lowers d


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(9))

    def log_prob(self, obs: Tensor, answer: Tensor) -> Tensor:
        """float (M,) of answers long (M,); of obs, a number that names the tuple, nothing depends."""
        return self.scores.log_softmax(0)[answer]


def collect(policy: Policy, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A rollout of twelve episodes: obs long (12,), answer long (12,), d float (12, 2)."""
    obs = torch.randint(2**60, (12,), generator=rng)
    answer = torch.multinomial(policy.scores.detach().softmax(0), 12, replacement=True, generator=rng)
    return obs, answer, torch.stack([torch.full((12,), 5.0), 5 - VALUE[answer]], 1)


def iteration(policy: Policy, optimizer: torch.optim.Optimizer, rng: torch.Generator) -> None:
    """Lines 2 to 8 once. Draws with rng, and calls policy.log_prob once an update."""
    raise NotImplementedError
