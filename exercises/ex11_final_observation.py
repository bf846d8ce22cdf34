"""Exercise 11: the final observation forgotten. 10 minutes, and two of computing.

Place: Section 3.1, and the detector d <= s of Section 3.2; s = 0.5 here.
Somebody stores (observation, action) pairs; the last observation has no action, so it is dropped.
Then no demonstration has the label 0 any more (exercise 1).
140 steps go into 50 bins, or into 140. A bin's value is its left edge (exercise 2).
Does the agent need fewer, the same, or more steps than one that has all labels? Same is within 5/4.

    python exercises/practice.py ex11 --seed 0
    pytest exercises -k ex11
"""

PREDICTION = {"50 bins": "", "140 bins": ""}  # fewer, same or more, each


def demonstrate(plain, episodes, rng):
    """pointmass.demonstrate, `plain`, without final observations."""
    data = plain(episodes, rng)
    return {name: values[data["steps_to_go"] > 0] for name, values in data.items()}


VARIANTS = {
    "50 bins": {"demonstrate": demonstrate, "bins": 50, "success_threshold": 0.5},
    "140 bins": {"demonstrate": demonstrate, "bins": 140, "success_threshold": 0.5},
}
