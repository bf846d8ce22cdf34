"""How often the scripted experts succeed: python results/experts.py writes results/experts.csv (500 episodes a row).

`expert` is the best we can script, `demonstrator` what Stage 1's data is recorded from, successes only.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import envs  # noqa: E402 - the repository's root is not installed
from common.runs import wilson  # noqa: E402
from envs.tabletop_language import FAMILIES  # noqa: E402

EPISODES = 500
SETTINGS = [("pointmass", {}), *(("tabletop", {"family": f, "blocks": b}) for b in (4, 8) for f in FAMILIES),
            ("tabletop", {"look": "real"}), ("bananatable", {}), ("aloha", {})]  # fmt: skip


def main() -> None:
    rows = []
    for name, settings in SETTINGS:
        for who in ("expert", "demonstrator"):
            env = envs.make_vec(name, EPISODES, obs="state", **settings)
            env.reset(seed=0)
            done, steps = np.zeros(EPISODES, bool), np.full(EPISODES, env.horizon)
            for t in range(env.horizon):
                _, _, terminated, _, _ = env.step(env.expert() if who == "expert" else env.demonstrate())
                steps[terminated & ~done] = t + 1
                done |= terminated
            low, high = wilson(int(done.sum()), EPISODES)
            told = " ".join(f"{k}={v}" for k, v in settings.items())
            row = {"domain": name, "settings": told, "who": who, "success": f"{done.mean():.3f}"}
            row |= {"low": f"{low:.3f}", "high": f"{high:.3f}"}
            rows.append(row | {"mean_steps_of_successes": f"{steps[done].mean():.1f}"})
            print(*rows[-1].values(), flush=True)
    with open(Path(__file__).parent / "experts.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
