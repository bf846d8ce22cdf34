"""Exercise 4: the reward and the returns. 15 minutes.

Place: Equation 2, and line 4 of Algorithm 1. The model's own d(o, g) is all that rewards:

    r_t = d(o_t, g) - d(o_t+1, g)      [Eq. 2]: closer is positive
    R_t = Σ_{i>=t} γ^(i-t) r_i         the discounted sum of the rewards to come

An episode of T steps has T + 1 observations. n episodes are a batch.

    pytest exercises -k ex04

You will see that at γ = 1 only the first and the last d are left.
"""

from torch import Tensor


def rewards(d: Tensor) -> Tensor:
    """float (n, T + 1) [steps] -> float (n, T)."""
    raise NotImplementedError


def monte_carlo_returns(reward: Tensor, gamma: float) -> Tensor:
    """float (n, T) -> float (n, T). Leaves `reward` as it is."""
    raise NotImplementedError
