"""Exercise 7: the mask of a prefix language model. 25 minutes.

Place: Appendix A, PaliGemma. A question of P tokens is read as a whole, an answer of L is made one by one.
Rows are the token that looks, columns what it looks at:

         P P P A A      The prefix sees all of itself and no answer.
       P 1 1 1 0 0      An answer token sees the prefix, itself, and the answer before it.
       P 1 1 1 0 0      Padding in the prefix (valid = False) is seen by nobody but itself;
       P 1 1 1 0 0      what it sees does not matter, and is the same as for the others.
       A 1 1 1 1 0
       A 1 1 1 1 1

    pytest exercises -k ex07

You will see that a token of the question changes every answer, and a later answer token no earlier one.
Therefore the prefix can be computed once and kept: decoding with and without cache agree.
"""

from torch import Tensor


def prefix_mask(valid: Tensor, answers: int) -> Tensor:
    """valid bool (B, P), answers = L -> bool (B, 1, P + L, P + L); the 1 is for the attention heads."""
    raise NotImplementedError
