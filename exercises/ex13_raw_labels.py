"""Exercise 13: a bug in the authors' notebook. 10 minutes, and two of computing.

Place: Section 3.1, L_steps_to_go. 140 steps go into 50 bins of 2.8 steps.
The notebook computes the bin of a label, and then uses the label itself as the class.
So 40 steps to go are class 40, whose value is 112 steps, and labels from 50 on teach nothing.
Does the agent need fewer, the same, or more steps than a correct one? Same is within 5/4.

    python exercises/practice.py ex13 --seed 0
    pytest exercises -k ex13

The rewards are differences of d. What does the bug do to them, near the goal and far from it?
"""

PREDICTION = ""  # fewer, same or more


def bin_of(plain, steps, bins):
    """pointmass.bin_of, but the label is the class; -100 is PyTorch's class that teaches nothing."""
    return steps.where(steps < bins, -100)


VARIANTS = {"50 bins, labels as classes": {"bins": 50, "bin_of": bin_of}}
