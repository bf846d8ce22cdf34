"""Exercise 1: the labels of steps to go. 10 minutes.

Place: Section 3.1, the objective L_steps_to_go.
An episode of n observations ends with its last one, in the goal.
The label of an observation is the number of steps that are left.
Demonstrations are stored flat, one episode behind the other.

    pytest exercises -k ex01

You will see every episode count down to 0 once: 0 is how the goal looks.
"""

from torch import Tensor


def steps_to_go(lengths: Tensor) -> Tensor:
    """Labels of all observations, the last ones included.

    lengths: observations in each episode, long (E,). Returns long (M,), M = lengths.sum().
    """
    raise NotImplementedError
