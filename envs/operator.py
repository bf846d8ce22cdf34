"""Who looks after the stations while a policy practises without resets.

As in the paper's appendix "Real-world Language Table experimentation procedure": one person for all robots.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorWrapper

from envs.domain import Domain


class Operator(VectorWrapper):
    """A domain whose `reset` is *ask again, or set up anew*; everything else is the domain's.

    An episode begins where the one before it ended, with a new instruction. A station is set up anew when
    something has fallen, when nothing is left to ask, and when it is due: a time after its last reset that is
    drawn anew each time. Whoever steps the stations adds up how long each has practised:

        env = Operator(env, seed=0)
        episodes = rollout(policy, reward_model, env, ...)
        env.steps += episodes.length
    """

    def __init__(self, env: Domain, seed: int, every: tuple[float, float] = (180.0, 300.0)):
        """every: the least and the greatest time between a station's resets [s].

        Raises ValueError where the domain cannot go on without a reset.
        """
        super().__init__(env)
        if not hasattr(env, "ask"):
            way_out = "practise on tabletop or bananatable"
            raise ValueError(f"--operator: {env.name} cannot go on without a reset; {way_out}")
        self.rng, self.every = np.random.default_rng(seed), every
        self.interventions = -env.num_envs  # setting the stations up is none
        self.steps = np.full(env.num_envs, 10**9)  # since the station's last reset: at first all are overdue
        self.due = self._draw_due(env.num_envs)  # at so many steps

    def __getattr__(self, name: str) -> Any:  # what the domain says of itself: horizon, obs, ...
        if name == "env" or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.env, name)

    def _draw_due(self, n: int) -> np.ndarray:
        return self.rng.uniform(*self.every, n) * self.env.metadata["render_fps"]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """What the next episode of every station begins with; the seed is for what is set up anew."""
        if options:
            raise ValueError(f"options {list(options)}: the operator decides what is set up anew")
        needs = self.env.fallen.any(1) | (self.steps > self.due)
        self.interventions += int(needs.sum())
        self.steps[needs] = 0
        self.due[needs] = self._draw_due(int(needs.sum()))
        if needs.any():
            self.env.reset(seed=seed, options={"reset_mask": needs})
        begun = self.env.ask(~needs)
        self.interventions += int(self.env.anew.sum())
        self.steps[self.env.anew] = 0
        return begun

    def hours(self, steps: int) -> float:
        """Robot-hours: a station's hour of practice each."""
        return steps / self.env.metadata["render_fps"] / 3600

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, in tensors, numbers, texts, lists and dicts."""
        own = {"rng": copy.deepcopy(self.rng.bit_generator.state), "interventions": self.interventions}
        return tensors(own | {"steps": self.steps, "due": self.due, "env": self.env.get_state()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = arrays(state)
        self.env.set_state(state["env"])
        self.rng.bit_generator.state = state["rng"]
        self.interventions, self.steps, self.due = (state[k] for k in ("interventions", "steps", "due"))


def tensors(value: Any) -> Any:
    """The same with each array as a tensor: what torch.load(weights_only=True) reads."""
    if isinstance(value, dict):
        return {k: tensors(v) for k, v in value.items()}
    if isinstance(value, list):
        return [tensors(v) for v in value]
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def arrays(value: Any) -> Any:
    """The inverse of `tensors`."""
    if isinstance(value, dict):
        return {k: arrays(v) for k, v in value.items()}
    if isinstance(value, list):
        return [arrays(v) for v in value]
    return value.cpu().numpy().copy() if isinstance(value, torch.Tensor) else value
