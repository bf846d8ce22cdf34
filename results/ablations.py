"""The README's ablations of `pointmass.py`: python results/ablations.py --seeds 3 writes results/pointmass_ablations.csv.

Each row is what `python pointmass.py FLAGS --seed S` prints. Stage 1 is trained once per seed and Stage 1 setting, and
every Stage 2 variant continues from it with the same state of the random generator, so the numbers are the same.
"""

import contextlib
import copy
import csv
import dataclasses
import io
import sys
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import pointmass  # noqa: E402 - the repository's root is not installed
from pointmass import Config  # noqa: E402

VARIANTS = {
    "": Config(),
    "--gamma 0": Config(gamma=0.0),
    "--gamma 1": Config(gamma=1.0),
    "--no-freeze-reward": Config(freeze_reward=False),
    "--success-threshold 3": Config(success_threshold=3.0),
    "--success ground-truth": Config(success="ground-truth"),
    "--no-keep-optimizer": Config(keep_optimizer=False),
    "--c 0.00714 (the notebook's 1 / 140)": Config(c=1 / 140),
    "--c 0.05 (the paper's)": Config(c=0.05),
    "--label-bug": Config(label_bug=True),
    "--bins 140": Config(bins=140),
    "--episodes 1000": Config(episodes=1000),
}


@dataclasses.dataclass
class Args:
    seeds: int = 3  # seeds 0, 1, ...
    out: Path = Path("results/pointmass_ablations.csv")  # the table


def main(args: Args) -> None:
    rows = []
    for seed in range(args.seeds):
        trained: dict[tuple, tuple] = {}
        for flags, variant in tqdm(VARIANTS.items(), desc=f"seed {seed}", disable=None):
            cfg = dataclasses.replace(variant, seed=seed)
            key = (cfg.episodes, cfg.bins, cfg.label_bug)
            with contextlib.redirect_stdout(io.StringIO()):
                if key not in trained:  # as in pointmass.main, up to Stage 2
                    rng = torch.manual_seed(seed)
                    data = pointmass.demonstrate(cfg.episodes, rng)
                    agent = pointmass.Agent(data, cfg.bins)
                    optimizer = pointmass.stage1(agent, data, cfg, rng)
                    first = pointmass.evaluate(agent, rng)
                    trained[key] = agent.state_dict(), optimizer.state_dict(), rng.get_state(), first, data
                weights, moments, state, first, data = trained[key]
                agent = pointmass.Agent(data, cfg.bins)
                agent.load_state_dict(copy.deepcopy(weights))
                optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, fused=True)
                optimizer.load_state_dict(copy.deepcopy(moments))
                rng = torch.default_generator
                rng.set_state(state)
                metrics = pointmass.stage2(agent, optimizer, cfg, rng)
                second = pointmass.evaluate(agent, rng)
            rows.append({"flags": flags, "seed": seed,
                         "stage1_success": first["success"], "stage1_mean_steps": first["mean_steps"],
                         "stage2_success": second["success"], "stage2_mean_steps": second["mean_steps"],
                         "env_steps": metrics[-1]["env_steps"], "practice_success_last": metrics[-1]["success"],
                         "practice_detected_last": metrics[-1]["detected"]})  # fmt: skip
            print(rows[-1], flush=True)
            with open(args.out, "w", newline="") as f:
                writer = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
