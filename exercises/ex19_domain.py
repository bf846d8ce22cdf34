"""Exercise 19: a domain of your own. 60 minutes.

Place: Section 5 has three domains; docs/domains.md says what one is, and builds another, a cart on a rail.
This one is a dial that wraps round: from 350 degrees it is 20 degrees to 10. The instruction names a mark.
Attributes are given, methods are not; no images. Simulation i draws from self.rngs[i], of NumPy.

    pytest exercises -k ex19

You will see the contract that all domains pass, `check_env` among it, pass for yours.
"""

import numpy as np

from envs import Domain, SingleView

MARKS = {"north": 0.0, "east": 90.0, "south": 180.0, "west": 270.0}  # degrees
NEAR, STRIDE = 5.0, 10.0  # success is nearer than this; the most that an action turns [degrees]


class DialVectorEnv(Domain):
    name, horizon = "dial", 60
    low, high = np.array([-STRIDE]), np.array([STRIDE])
    action_tokens = {"kind": "uniform", "bins": 21, "low": -STRIDE, "high": STRIDE, "dims": 1}
    state_names, state_dim = ("dial",), 2
    steps_cap, steps_bins, success_threshold = 60, 60, 1.0
    stage1_defaults = {"state": {"model": "nano", "episodes": 1000, "updates": 1000, "policy": "best"}}
    stage2_defaults = {"state": {"iterations": 30}}
    STATE_FIELDS = ("angle", "mark")  # what the future depends on, beside self.t, self.texts and self.rngs

    def __init__(self, num_envs=1, obs="state", size=32, render_mode=None):
        super().__init__(num_envs, obs, size, render_mode)
        self.angle, self.mark = np.zeros(num_envs), np.zeros(num_envs)  # [degrees], 0 <= angle < 360

    def instructions(self) -> list[str]:
        return [f"turn the dial {mark}" for mark in MARKS]

    def left(self) -> np.ndarray:
        """The shortest turn to the mark, float (N,) in [-180, 180) degrees."""
        raise NotImplementedError

    def _place(self, rows: np.ndarray) -> None:
        """For each i of rows draw self.mark[i] and self.texts[i], one of instructions(), that go together,
        and self.angle[i], at least 2 NEAR away from the mark."""
        raise NotImplementedError

    def _move(self, actions: np.ndarray) -> None:
        """Turn by actions[:, 0] [degrees], float (N, 1)."""
        raise NotImplementedError

    def _state(self) -> np.ndarray:
        """Sine and cosine of the angle, float32 (N, 2): not the mark, which only the instruction names."""
        raise NotImplementedError

    def _success(self) -> np.ndarray:
        """bool (N,)."""
        raise NotImplementedError

    def demonstrate(self) -> np.ndarray:
        """float (N, 1): the right way at half the pace, so that practice has something to find."""
        raise NotImplementedError

    def expert(self) -> np.ndarray:
        """float (N, 1): the best."""
        raise NotImplementedError

    def render(self) -> tuple[np.ndarray, ...]:
        """N pictures for people, uint8 (64, 64, 3): a white hand. Given."""
        x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(1, -1, 64))
        where = np.degrees(np.arctan2(x, y))  # (64, 64), 0 is up
        off = np.abs((where - self.angle[:, None, None] + 180) % 360 - 180)  # (N, 64, 64)
        return tuple(np.repeat(np.uint8(255 * (o < 10))[..., None], 3, 2) for o in off)


class DialEnv(SingleView):
    vector_class = DialVectorEnv
