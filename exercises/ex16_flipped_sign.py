"""Exercise 16: the sign of Equation 2 flipped. 10 minutes, and two of computing.

Place: Equation 2. Whoever writes d(o_t+1) - d(o_t) pays the robot for going away.
Stage 1 alone succeeds in most episodes.
After practice with the flipped sign, is success "none" (below 0.05), "some", or "all" (above 0.95)?
Predict it twice: as pointmass.stage2 is, and where it does not load the best policy at its end.

    python exercises/practice.py ex16 --seed 0
    pytest exercises -k ex16

Which line of pointmass.stage2 hides such a bug, and what would have shown it in the first minute?
"""

MEASURE = "success"
PREDICTION = {"the best policy": "", "the last policy": ""}  # none, some or all, each


def rewards(plain, d):
    return -plain(d)


def keep_the_last(plain, agent, best):
    """In place of Agent.load_state_dict."""


VARIANTS = {
    "the best policy": {"rewards": rewards},
    "the last policy": {"rewards": rewards, "Agent.load_state_dict": keep_the_last},
}
