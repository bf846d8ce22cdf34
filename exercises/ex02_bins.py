"""Exercise 2: steps to go as tokens, and Equation 1. 15 minutes.

Place: Section 3.1. The model answers "how many steps?" with one of K tokens.
Token k stands for the steps from k * cap / K on: K bins of the same width, which need not be whole.
Steps of cap and more go to the last bin.
What Stage 2 uses is the expectation over the tokens, with the *left edge* of each bin as its value:

    d(o, g) = Σ_k p(k | o, g) · edge_k      [Eq. 1]

    pytest exercises -k ex02

You will see why the left edge: d must be able to become 0.
"""

from torch import Tensor


def encode(steps: Tensor, cap: int, bins: int) -> Tensor:
    """The token of each label: long (M,) -> long (M,), 0 ... bins - 1."""
    raise NotImplementedError


def expected(p: Tensor, cap: int, bins: int) -> Tensor:
    """d of each row of probabilities: float (B, bins) -> float (B,) [steps]."""
    raise NotImplementedError
