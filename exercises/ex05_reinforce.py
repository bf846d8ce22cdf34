"""Exercise 5: the REINFORCE loss. 25 minutes.

Place: line 7 of Algorithm 1. Of a batch of tuples (o, a, g, R):

    loss = mean over the batch of  -c · R · log p(a | o, g)

a was sampled from p, R is a number: no gradient flows through it.
Its expected gradient is the exact gradient of the expected return, and that is what the check computes.
Why log p and not p? Actions that are sampled often are also pushed often; 1 / p takes that back.

    pytest exercises -k ex05

You will see a bandit of nine answers go from a value of 0.5 to above 3 of 4 in 60 updates.
"""

from torch import Tensor


def reinforce_loss(log_prob: Tensor, returns: Tensor, c: float) -> Tensor:
    """log_prob, returns float (B,) -> float (), to be minimised."""
    raise NotImplementedError
