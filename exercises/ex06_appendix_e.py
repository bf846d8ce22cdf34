"""Exercise 6: the term that Appendix E leaves out. 25 minutes, with paper and pencil.

Place: Appendix E, Equation 3. Let V = -d. For any γ, Equation 2 is a value and a shaping term:

    r_t = (1 - γ) V(o_t+1) + [γ V(o_t+1) - V(o_t)]      [Eq. 3]

Summed up with discount, the shaping telescopes. The paper writes the return as

    R_t = (1 - γ) Σ_{i=t}^T γ^(i-t) V(o_i+1)  -  V(o_t)          and something is missing.

Sum the brackets by hand for t = T and for t = T - 1; then write what is missing in general.
Time counts 1 ... T, so column t - 1 is time t; V has T + 1 columns.

    pytest exercises -k ex06

You will see when the paper's formula is exact. Then look at it: `python exercises/appendix_e.py`.
"""

from torch import Tensor


def missing_term(value: Tensor, gamma: float) -> Tensor:
    """What to add to the paper's R: V float (n, T + 1) -> float (n, T)."""
    raise NotImplementedError
