"""Speeds of the domains, measured in one run: python -m tests.benchmark. Not a test: nothing here depends on them."""

import itertools
import time

import gymnasium as gym
import numpy as np

import envs
from envs.pointmass import draw
from stage1 import record


def rate(function, amount: int, seconds: float = 2.0) -> float:
    """`amount` things a call, per second, over about `seconds`."""
    function()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        function()
        calls += 1
    return calls * amount / (time.perf_counter() - start)


def aloha(seconds: float = 10.0) -> None:
    """Decisions of 0.5 s, 16 at once, while the expert moves peg and socket; the expert's own time is not counted."""
    for obs in ("state", "images"):
        env, taken, decisions = envs.make_vec("aloha", 16, obs=obs), 0.0, 0
        while taken < seconds:
            if decisions % (16 * 8) == 0:
                env.reset(seed=decisions)
            action = env.expert()
            start = time.perf_counter()
            env.step(action)
            taken, decisions = taken + time.perf_counter() - start, decisions + 16
        print(f"aloha decisions, obs={obs}, 16 at once: {decisions / taken:,.0f} /s")


def main() -> None:
    rng, n = np.random.default_rng(0), 256
    pos, goals = rng.uniform(-1, 1, (n, 2)), rng.uniform(-0.9, 0.9, (n, 3, 2))
    print(f"pointmass frames, 32 x 32, batches of {n}: {rate(lambda: draw(pos, pos, goals, 32), n):,.0f} /s")
    for obs in ("state", "images"):
        env = envs.make_vec("pointmass", n, obs=obs)
        env.reset(seed=0)
        action = env.action_space.sample()
        print(f"pointmass steps, obs={obs}, {n} at once: {rate(lambda env=env, a=action: env.step(a), n):,.0f} /s")
    n = 64
    for obs in ("state", "images"):  # images: two frames of 64 x 64, one of them new
        batch = envs.make_vec("tabletop", n, obs=obs)
        batch.reset(seed=0)
        singles = [gym.make(envs.DOMAINS["tabletop"], obs=obs).unwrapped for _ in range(n)]
        for i, env in enumerate(singles):
            env.reset(seed=i)
        # pushes there and back, so that blocks are touched but stay on the table
        actions = itertools.cycle(s * rng.uniform(-0.03, 0.03, (n, 2)).astype(np.float32) for s in (1, -1) for _ in range(50))
        together = rate(lambda batch=batch, a=actions: batch.step(next(a)), n)
        loop = rate(lambda singles=singles, a=actions: [env.step(x) for env, x in zip(singles, next(a), strict=True)], n)
        print(f"tabletop control steps, obs={obs}, 4 blocks, {n} at once: {together:,.0f} /s; "
              f"{n} single environments in a loop: {loop:,.0f} /s; {together / loop:.1f} times")  # fmt: skip
    start = time.perf_counter()
    record("tabletop", "images", 512, seed=0)
    print(f"tabletop demonstrations with frames: {512 / (time.perf_counter() - start) * 60:,.0f} episodes a minute")
    aloha()


if __name__ == "__main__":
    main()
