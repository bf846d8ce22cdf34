"""Figure 2 on Aloha: d(o, g) over an episode in which the peg is dropped and grasped again, with some of its frames.

    python results/figure2.py --run runs/aloha-stage1-s0     # writes results/aloha_steps_to_go.png and .csv

The episode is a demonstrator's that the reward model has not been trained on: the first of eight in which both
objects had left the table before the right arm let the peg go.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, options  # noqa: E402 - the repository's root is not installed
from common.cli import cli  # noqa: E402
from common.options import Whole  # noqa: E402
from common.pictures import BLUE, ORANGE, WIDTH, plt  # noqa: E402
from common.setup import load_run  # noqa: E402
from rollout import encode_observation  # noqa: E402
from tokens import StepsToGo  # noqa: E402


@dataclass
class Config:
    run: str = "runs/aloha-stage1-s0"  # folder of a Stage 1 run on aloha; its reward model judges
    seed: Whole = (
        71 * 10**7
    )  # of the episodes: apart from those of training (below 10^8 for seeds up to 99) and of evaluation
    out: str = str(
        Path(__file__).with_name("aloha_steps_to_go")
    )  # the figure's and the table's name, without .png and .csv


@torch.no_grad()
def main(cfg: Config) -> None:
    options.check(cfg)
    env, _, reward_model = load_run(Path(cfg.run), 8)
    if env.name.split(",")[0] != "aloha":
        raise UserError(f"--run {cfg.run}: of {env.name}; name a Stage 1 run of --domain aloha")
    steps, everyone = StepsToGo(env.steps_cap, env.steps_bins), np.arange(8)
    obs, info = env.reset(seed=cfg.seed)
    env.miss[:], env.bump[:], env.drops[:] = (
        0,
        0,
        [False, True],
    )  # every right arm drops the peg once, and that is all
    d, held, height, truth, frames = [], [], [], [], []
    while True:
        seen = encode_observation(reward_model, obs, everyone)
        d.append(reward_model.steps_to_go(seen, list(obs["instruction"]), steps).cpu().numpy())
        held.append(env.held.copy()), height.append(env.objects[0][..., 2].copy())
        truth.append(info["is_success"].copy()), frames.append(np.stack(env.render()))
        if len(d) > env.horizon:
            break
        obs, _, _, _, info = env.step(env.demonstrate())
    d, held, height, truth = map(np.stack, (d, held, height, truth))  # (T + 1, 8, ...)

    for i in everyone:
        end = int(truth[:, i].argmax())
        if not end:  # never inserted
            continue
        lifted = np.flatnonzero((height[:end, i] > 0.05).all(1))
        lost = np.flatnonzero(held[: end - 1, i, 1] & ~held[1:end, i, 1]) + 1
        lost = lost[lost > lifted[0]] if len(lifted) else lost[:0]
        again = np.flatnonzero(held[:end, i].all(1) & (np.arange(end) > lost[0])) if len(lost) else lost
        if len(again):
            break
    else:
        raise UserError(
            f"--seed {cfg.seed}: no episode in which the peg is dropped and inserted all the same; name another"
        )
    moments = {
        "start": 0,
        "both lifted": int(lifted[0]),
        "peg dropped": int(lost[0]),
        "grasped again": int(again[0]),
        "inserted": end,
    }

    with open(f"{cfg.out}.csv", "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["t", "d", "left_holds_socket", "right_holds_peg", "decisions_truly_left", "moment"])
        names = {t: name for name, t in moments.items()}
        for t in range(end + 1):
            writer.writerow(
                [t, f"{d[t, i]:.3f}", int(held[t, i, 0]), int(held[t, i, 1]), end - t, names.get(t, "")]
            )
    layout = [list(moments), ["d"] * len(moments)]
    fig, axes = plt.subplot_mosaic(layout, figsize=(WIDTH, 4.4), height_ratios=[1, 1.7], layout="constrained")
    for name, t in moments.items():
        axes[name].imshow(frames[t][i])
        axes[name].set_title(f"{name}, t = {t}", fontsize=8)
        axes[name].axis("off")
        axes["d"].axvline(t, color="0.8", zorder=0)
    t = np.arange(end + 1)
    axes["d"].plot(t, d[: end + 1, i], ".-", color=BLUE, label="d(o, g), predicted")
    axes["d"].plot(t, end - t, "--", color=ORANGE, label="decisions truly left in this episode")
    axes["d"].set(xlabel="t [decisions of 0.5 s]", ylabel="steps to go", title=f'"{obs["instruction"][i]}"')
    axes["d"].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes["d"].legend()
    fig.savefig(f"{cfg.out}.png")
    print(f"wrote {cfg.out}.png and .csv: {', '.join(f'{name} at {t}' for name, t in moments.items())}")


if __name__ == "__main__":
    cli(Config, main)
