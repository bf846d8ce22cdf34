"""Real2Sim (the paper's Section 5.2): demonstrations in one look of the table, practice in another.

    python results/real2sim.py            # hours: trains what is not in runs/ yet, measures, draws
    python results/real2sim.py --seed 1   # a seed alone, in a process of its own
    python results/real2sim.py --pilot    # the same in tiny, to see that all of it works

The tabletop from images. Stage 1 learns from demonstrations in look=real, which has other colours and light, an
unsteady camera, other friction, and a slower tool. Then the policy practises in look=sim, and d, which has never
counted steps there, says how it does. Stage 0 stands for the web: it has seen both looks, or real alone (`--stage0 real`).
Between the two looks lies a line, look=0.75 and so on: success and d are measured along it.
Whatever is interrupted goes on when the command is given again; a row of the CSV that is there is not measured again.

Writes results/real2sim.csv, real2sim.png, and a table of docs/pretraining.md.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from measuring import (  # noqa: E402
    JUDGED,
    JUDGED_HEAD,
    before_and_after,
    cells,
    chosen,
    judged,
    once,
    publish,
    table,
    taught_and_practised,
)

from common import demos  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, Whole, check  # noqa: E402
from common.pictures import BLUE, GREEN, ORANGE, WIDTH, plt  # noqa: E402
from envs import make_vec  # noqa: E402

SEEN = {  # by Stage 0: its domains; a banana's table is there for the other experiment of the same page
    "both": ("tabletop,family=mixed,look=real", "tabletop,family=mixed", "bananatable"),
    "real": ("tabletop,family=mixed,look=real", "bananatable,look=real"),
}
LOOKS = (1.0, 0.75, 0.5, 0.25, 0.0)  # from real to sim
SETTINGS = ("stage0", "episodes", "stage0_updates", "updates", "iterations", "eval_episodes")
PAPER = {"stage1": 0.225, "stage2": 0.59}  # success in simulation, before and after practice there
PAGE = Path("docs/pretraining.md")


@dataclass
class Config:
    seeds: Count = 2  # seeds 0, 1, ...
    seed: Whole | None = None  # this one alone; nothing is drawn
    stage0: Literal["both", "real"] = "both"  # the looks that Stage 0 has seen
    episodes: Count = 8000  # demonstrations
    stage0_updates: Count = 5000
    updates: Count = 8000  # of Stage 1
    iterations: Count = 150  # of Stage 2, at most
    eval_episodes: Count = 300  # fresh ones of a measurement
    pilot: bool = False  # everything tiny, in runs/real2sim-pilot/


# --- measurements -----------------------------------------------------------------------------------------------------
def measure(taught: Path, practised: Path, look: float, cfg: Config, seed: int) -> dict[str, float]:
    """A row: both policies' true success in a look; d's rank correlation there; the detector in Stage 1's episodes."""
    env = make_vec(f"tabletop,look={look:g}", 1, obs="images")
    told = before_and_after(taught, practised, env, cfg.eval_episodes, seed)
    return told | judged(taught, env, cfg.eval_episodes, 4 if cfg.pilot else 50, seed)


# --- training ---------------------------------------------------------------------------------------------------------
def train(cfg: Config, runs: Path, seed: int) -> tuple[Path, Path]:
    """The Stage 1 run in look=real and the Stage 2 run in look=sim, trained if they are not there."""
    domain, *also = SEEN[cfg.stage0]
    seen = {"domain": domain, "also": tuple(also), "updates": cfg.stage0_updates}
    name = f"{runs}/{cfg.stage0}"
    return taught_and_practised(cfg, name, seed, seen, "tabletop,look=real", "tabletop,look=sim")


# --- what comes out ---------------------------------------------------------------------------------------------------
def draw(rows: list[dict[str, str]], cfg: Config) -> plt.Figure:
    """Success before and after practice, and d's rank correlation, along the way from real to sim."""
    fig, (success, order) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained")
    lines = [  # dashed, on top of Stage 1's where practice found nothing
        (success, "stage1_success", "-", BLUE, "Stage 1"),
        (success, "stage2_success", "--", ORANGE, "practice in sim"),
        (order, "rank_correlation", "-", GREEN, "d and the steps truly left"),
    ]
    for ax, column, style, colour, label in lines:
        told = [[float(row[column]) for row in chosen(rows, look=look)] for look in LOOKS]
        ax.plot(range(len(LOOKS)), [np.mean(of_look) for of_look in told], style, color=colour, label=label)
        for i, of_look in enumerate(told):
            ax.plot([i] * len(of_look), of_look, "o", color=colour, ms=4)
    for name, colour in (("stage1", BLUE), ("stage2", ORANGE)):
        success.plot([len(LOOKS) - 0.6], [PAPER[name]], "*", color=colour, ms=9, clip_on=False)
    success.text(len(LOOKS) - 0.6, 0.02, "paper", ha="center", fontsize=8)
    success.set(
        ylabel="true success", title=f"{cfg.seeds} seed{'s' * (cfg.seeds > 1)}, Stage 0 saw {cfg.stage0}"
    )
    order.set(ylabel="rank correlation", title="d on demonstrations")
    for ax in (success, order):
        ax.set_xticks(range(len(LOOKS)), ["real", *(f"{look:g}" for look in LOOKS[1:-1]), "sim"])
        ax.set(ylim=(0, 1.02), xlabel="look")
    fig.legend(*success.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def summary(rows: list[dict[str, str]]) -> str:
    """One line a look: the mean and, of several seeds, the least and the greatest."""
    lines = []
    for look in LOOKS:
        name = {1.0: "real", 0.0: "sim"}.get(look, f"{look:g}")
        lines.append([name, *cells(chosen(rows, look=look), JUDGED)])
    head = ["look", "Stage 1", "practice in sim", *JUDGED_HEAD[2:]]
    return table(head, lines)


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/real2sim"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/real2sim-pilot")
        cfg.seeds, cfg.episodes = 1, 20
        cfg.stage0_updates = cfg.updates = cfg.iterations = cfg.eval_episodes = 2
    demos.split(cfg.episodes, 1.0)  # its complaints, before anything is trained
    runs.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(cfg).items() if name in SETTINGS}
    rows = []
    for seed in range(cfg.seeds) if cfg.seed is None else [cfg.seed]:
        taught, practised = train(cfg, runs, seed)
        for look in LOOKS:
            key = {"look": look, "seed": seed} | settings
            of_look = (taught, practised, look, cfg, seed)
            rows.append(once(out / "real2sim.csv", key, lambda of_look=of_look: measure(*of_look)))
    if cfg.seed is not None:
        return
    draw(rows, cfg).savefig(out / f"real2sim{'-real' * (cfg.stage0 == 'real')}.png")
    plt.close("all")
    told = summary(rows)
    print(told)
    if not cfg.pilot and cfg.stage0 == "both":
        picture = "![Success and d from real to sim](../results/real2sim.png)"
        publish(PAGE, "real2sim", told, cfg.seeds, picture)


if __name__ == "__main__":
    cli(Config, main)
