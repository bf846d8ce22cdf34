"""Exercise 10: γ = 1. 5 minutes, and one of computing.

Place: line 4 of Algorithm 1. The paper discounts with γ = 0.9.
At γ = 1 the return is R_t = d(o_t) - d(o_end), whatever is done in between (exercise 4).
Does practice then need fewer, the same, or more steps to the goal? Same is within a factor of 5/4.

Write your prediction, then see:

    python exercises/practice.py ex10 --seed 0
    pytest exercises -k ex10
"""

PREDICTION = ""  # fewer, same or more

VARIANTS = {"gamma 1": {"gamma": 1.0}}
