"""Exercise 15: a fresh optimiser. 5 minutes, and one of computing.

Place: between the stages. pointmass.py goes on with Stage 1's Adam, as the authors' notebook does.
Adam divides a gradient by the root of its running mean square, whatever the gradient's size is.
The loss of Stage 2 is small beside Stage 1's, and c makes it smaller.
With a fresh Adam, whose running means begin at 0: fewer, the same, or more steps? Same is within 5/4.

    python exercises/practice.py ex15 --seed 0
    pytest exercises -k ex15

What size has an update of a fresh Adam, and what does c do to it?
"""

PREDICTION = ""  # fewer, same or more

VARIANTS = {"a fresh Adam": {"keep_optimizer": False}}
