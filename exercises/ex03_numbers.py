"""Exercise 3: actions as tokens. 20 minutes.

Place: Appendix A.1, LanguageTable. A number becomes two tokens, its sign and its magnitude.
Magnitudes are 0 ... 10: limit is 10, halfway is 5, rounded to the nearest; beyond the limit is 10.
The sign tokens follow them: 11 is plus, 12 is minus. What rounds to zero is +0, never -0.
So (30 mm, -15 mm) with a limit of 30 mm is 11 10 12 5.

    pytest exercises -k ex03

You will see what tokens cost: of 30 mm at most 1.5 mm are lost.
"""

from torch import Tensor

PLUS, MINUS = 11, 12


def encode(action: Tensor, limit: float) -> Tensor:
    """float (B, A) -> long (B, 2 A): sign, magnitude, sign, magnitude, ..."""
    raise NotImplementedError


def decode(tokens: Tensor, limit: float) -> Tensor:
    """long (B, 2 A) -> float (B, A)."""
    raise NotImplementedError
