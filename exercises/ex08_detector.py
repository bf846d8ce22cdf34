"""Exercise 8: is the detector right? 20 minutes.

Place: Section 3.2, success(o, g) = 1[d(o, g) <= s]. It ends the episodes of practice.
"Right" has two meanings. Strict: the goal is reached at this moment.
Fair: d <= s claims "at most s steps to go", so the goal must be reached within s steps.

    pytest exercises -k ex08

You will see one detector, false in every case by the first measure and right in most by the second.
"""

from torch import Tensor


def confusion(detected: Tensor, truth: Tensor) -> dict[str, int]:
    """Of bool (n,) each, the counts "true_positives", "false_positives", "false_negatives", "true_negatives".

    Positive is what the detector says; false, where the truth says otherwise.
    """
    raise NotImplementedError


def confirmed_within(d: Tensor, truth: Tensor, s: float) -> list[bool]:
    """For each episode with a detection, in order: is it true at, or up to s steps after, its first one?

    d float, truth bool (n, T + 1). s need not be whole: then the steps are rounded up.
    An episode without any d <= s gives no entry.
    """
    raise NotImplementedError
