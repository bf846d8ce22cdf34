"""The paper's Figure 3 as it was trained: Stage 1 sees every family of instructions, practice is on Block2Block alone.

    python results/families.py             # hours: trains what is not in runs/ yet, measures, draws
    python results/families.py --seed 1    # a seed alone, in a process of its own
    python results/families.py --pilot     # the same in tiny, to see that all of it works

The tabletop from states. Figure 3 counts Block2Block demonstrations only, and so does its copy here. The policy is
measured on each family before and after practice: the paper does not say what becomes of those not practised.
Whatever is interrupted goes on when the command is given again; a row of the CSV that is there is not measured again.

Writes results/families.csv, families.png, and a table of docs/results.md.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from measuring import (  # noqa: E402
    TINY_PRACTICE,
    before_and_after,
    chosen,
    finish,
    once,
    publish,
    require_shares,
    table,
    with_interval,
)

import stage1  # noqa: E402 - the repository's root is not installed
import stage2  # noqa: E402
from common import demos  # noqa: E402
from common.cli import cli  # noqa: E402
from common.options import Count, Whole, check  # noqa: E402
from common.pictures import BLUE, ORANGE, WIDTH, plt  # noqa: E402
from common.runs import read_json  # noqa: E402
from envs import make_vec  # noqa: E402
from envs.tabletop_language import FAMILIES, instructions  # noqa: E402

SETTINGS = ("episodes", "updates", "iterations", "eval_episodes")
PRACTISED = "block2block"
# Figure 3, simulated LanguageTable: success of Stage 1 and of Stage 2 by share of the demonstrations
PAPER = {"stage1": {10: 0.45, 20: 0.57, 80: 0.585}, "stage2": {10: 0.745, 20: 0.89, 80: 0.97}}
PAGE = Path("docs/results.md")


@dataclass
class Config:
    seeds: Count = 3  # seeds 0, 1, ...
    seed: Whole | None = None  # this one alone; nothing is drawn
    shares: tuple[float, ...] = (0.25, 1.0)  # of the demonstrations to learn from
    episodes: Count = 8000  # demonstrations recorded for a seed, a fifth of them Block2Block
    updates: Count = 8000  # of Stage 1
    iterations: Count = 200  # of Stage 2, at most
    eval_episodes: Count = 500  # fresh ones of each family
    pilot: bool = False  # everything tiny, in runs/families-pilot/


# --- measurements -----------------------------------------------------------------------------------------------------
def of_family(goals: np.ndarray, family: str) -> int:
    """How many of the instructions str (n,) are the family's."""
    return int(np.isin(goals, instructions((family,), 4)).sum())


def demonstrations(run: Path) -> dict[str, int]:
    """How many a Stage 1 run had, held out or not, and how many of the family that is practised."""
    settings = SimpleNamespace(**read_json(run / "config.json"))
    learnt, held_out = demos.load(settings, make_vec(settings.domain, 1, obs=settings.obs))
    goals = np.concatenate([learnt.instruction, held_out.instruction])
    return {"demonstrations": len(goals), f"{PRACTISED}_demonstrations": of_family(goals, PRACTISED)}


def measure(imitated: Path, practised: Path, family: str, episodes: int, seed: int) -> dict[str, float]:
    """A row: both policies' true success on one family's instructions, the same scenes for both."""
    env = make_vec(f"tabletop,family={family}", 1, obs="state")
    return before_and_after(imitated, practised, env, episodes, seed)


# --- training ---------------------------------------------------------------------------------------------------------
def train(cfg: Config, runs: Path, share: float, seed: int) -> tuple[Path, Path]:
    """The Stage 1 run and the Stage 2 run, trained if they are not there."""
    tiny1, tiny2 = {}, {}
    if cfg.pilot:
        tiny1 = {"batch": 9, "eval_every": cfg.updates}
        tiny2 = TINY_PRACTICE
    of_stage1 = {"domain": "tabletop,family=mixed", "obs": "state", "data_fraction": share, "seed": seed}
    of_stage1 |= {name: getattr(cfg, name) for name in ("episodes", "updates", "eval_episodes")}
    out = f"{runs}/{share:g}-stage1-s{seed}"
    imitated = finish(stage1.main, stage1.Config(**of_stage1 | tiny1, out=out))
    of_stage2 = {"stage1": str(imitated), "domain": f"tabletop,family={PRACTISED}"}
    of_stage2 |= {name: getattr(cfg, name) for name in ("iterations", "eval_episodes")}
    out = f"{runs}/{share:g}-stage2-s{seed}"
    return imitated, finish(stage2.main, stage2.Config(**of_stage2 | tiny2, out=out))


# --- what comes out ---------------------------------------------------------------------------------------------------
def values(rows: list[dict[str, str]], family: str, share: float, column: str) -> list[float]:
    """Of every seed."""
    return [float(row[column]) for row in chosen(rows, family=family, share=float(share))]


def draw(rows: list[dict[str, str]], cfg: Config) -> plt.Figure:
    """Block2Block over its demonstrations, the paper's Figure 3 beside it, and every family at the largest share."""
    fig, (ours, paper, families) = plt.subplots(1, 3, figsize=(WIDTH, 3.2), layout="constrained")
    for name, colour in (("stage1", BLUE), ("stage2", ORANGE)):
        label = {"stage1": "Stage 1", "stage2": "Stage 1 + 2"}[name]
        x, y = [], []
        for share in sorted(cfg.shares):
            x.append(np.mean(values(rows, PRACTISED, share, f"{PRACTISED}_demonstrations")))
            told = values(rows, PRACTISED, share, f"{name}_success")
            y.append(np.mean(told))
            ours.plot([x[-1]] * len(told), told, "o", color=colour, ms=3)
        ours.plot(x, y, "o-", color=colour, label=label)
        paper.plot(list(PAPER[name]), list(PAPER[name].values()), "o-", color=colour)
        for i, family in enumerate(FAMILIES):
            told = values(rows, family, max(cfg.shares), f"{name}_success")
            at = i + (0.2 if name == "stage2" else -0.2)
            families.barh(at, np.mean(told), 0.38, color=colour)
            families.plot(told, [at] * len(told), "o", color="black", ms=2.5)
    ours.set(title=f"here, {cfg.seeds} seed{'s' * (cfg.seeds > 1)}", xlabel="Block2Block demonstrations")
    paper.set(title="the paper's Figure 3", xlabel="% of the demonstrations")
    for ax in (ours, paper):
        ax.set(ylim=(0, 1.02), ylabel="success on Block2Block", xscale="log")
        ax.minorticks_off()
    ours.set_xticks(x, [f"{n:,.0f}" for n in x])
    paper.set_xticks(list(PAPER["stage1"]), [str(n) for n in PAPER["stage1"]])
    names = [family.replace("location", "") for family in FAMILIES]
    families.set_yticks(range(len(FAMILIES)), [name.replace("_", " ") for name in names])
    families.invert_yaxis()
    families.set(xlim=(0, 1.02), title="each family, most demonstrations", xlabel="success")
    fig.legend(*ours.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def summary(rows: list[dict[str, str]], cfg: Config) -> str:
    """One line a share and family: the mean and, of several seeds, the least and the greatest."""
    lines = []
    for share in cfg.shares:
        for family in FAMILIES:
            demonstrated = np.mean(values(rows, family, share, "demonstrations"))
            line = [f"{demonstrated:,.0f}", family.replace("_", " ")]
            of_line = chosen(rows, family=family, share=float(share))
            for column, digits in (("success", 2), ("mean_steps", 1)):
                line += [
                    with_interval(of_line, f"{stage}_{column}", digits) for stage in ("stage1", "stage2")
                ]
            lines.append(line)
    return table(["demonstrations", "family", "imitation", "after practice", "steps", "steps after"], lines)


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/families"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/families-pilot")
        cfg.seeds, cfg.shares, cfg.episodes = 1, (0.5, 1.0), 40
        cfg.updates = cfg.iterations = cfg.eval_episodes = 2
    require_shares(cfg.shares, cfg.episodes)
    runs.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(cfg).items() if name in SETTINGS}
    rows = []
    for seed in range(cfg.seeds) if cfg.seed is None else [cfg.seed]:
        for share in cfg.shares:
            imitated, practised = train(cfg, runs, share, seed)
            counted = demonstrations(imitated)
            for family in FAMILIES:
                key = {"family": family, "share": share, "seed": seed} | settings | counted
                of_family = (imitated, practised, family, cfg.eval_episodes, seed)
                rows.append(once(out / "families.csv", key, lambda of_family=of_family: measure(*of_family)))
    if cfg.seed is not None:
        return
    draw(rows, cfg).savefig(out / "families.png")
    plt.close("all")
    told = summary(rows, cfg)
    print(told)
    if not cfg.pilot:
        picture = "![Block2Block, and every family, before and after practice](../results/families.png)"
        publish(PAGE, "families", told, cfg.seeds, picture)


if __name__ == "__main__":
    cli(Config, main)
