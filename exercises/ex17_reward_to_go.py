"""Exercise 17: one return for the whole episode. 10 minutes, and one of computing.

Place: line 4 of Algorithm 1. R_t sums the rewards from t on: the reward-to-go.
An action cannot change what was before it, so the past only adds noise.
With R_1 for every step of the episode: fewer, the same, or more steps? Same is within 5/4.

    python exercises/practice.py ex17 --seed 0
    pytest exercises -k ex17

Which of the actions of an episode does R_1 still speak of, at γ = 0.9?
"""

PREDICTION = ""  # fewer, same or more


def monte_carlo_returns(plain, reward, gamma):
    return plain(reward, gamma)[:, :1].expand_as(reward)


VARIANTS = {"one return an episode": {"monte_carlo_returns": monte_carlo_returns}}
