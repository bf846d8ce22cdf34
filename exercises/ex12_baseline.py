"""Exercise 12: the textbook's baseline. 5 minutes, and one of computing.

Place: line 7 of Algorithm 1. Textbooks subtract a baseline from the return:
the gradient's expectation stays what it is, its variance shrinks.
The simplest is the batch's mean return: half of the tuples then have a negative one.
With the mean subtracted: fewer, the same, or more steps to the goal? Same is within 5/4.

    python exercises/practice.py ex12 --seed 0
    pytest exercises -k ex12

What does -R log p do to a rare action with R < 0? Draw it against log p.
"""

PREDICTION = ""  # fewer, same or more


def reinforce_loss(plain, log_prob, returns, c):
    return plain(log_prob, returns - returns.mean(), c)


VARIANTS = {"minus the mean return": {"reinforce_loss": reinforce_loss}}
