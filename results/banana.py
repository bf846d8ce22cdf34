"""BananaTable (the paper's Section 5.3.2): practise a skill that no demonstration showed.

    python results/banana.py            # hours: trains what is not in runs/ yet, measures, films, draws
    python results/banana.py --seed 1   # a seed alone, in a process of its own
    python results/banana.py --pilot    # the same in tiny, to see that all of it works

From images. Stage 0 sees tables with blocks and tables with a banana; its control, `--stage0 without`, has the same
words in its vocabulary and has never seen a banana or read of one. Stage 1 learns from blocks that are pushed to places
of the table. Then the policy practises with the banana alone, which turns where it is pushed beside its middle.
Whatever is interrupted goes on when the command is given again; a row of the CSV that is there is not measured again.

Writes results/banana.csv, banana.png, two tables of docs/pretraining.md, and a film, runs/banana/banana.gif.
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
    logged,
    once,
    publish,
    table,
    taught_and_practised,
)

from common import demos  # noqa: E402
from common.cli import cli  # noqa: E402
from common.counting import chunks  # noqa: E402
from common.options import Count, Whole, check  # noqa: E402
from common.pictures import BLUE, GREEN, ORANGE, WIDTH, plt, save_gif  # noqa: E402
from common.setup import load_run  # noqa: E402
from envs import Domain, make_vec  # noqa: E402
from eval import film  # noqa: E402
from model import EFM  # noqa: E402
from rollout import rollout  # noqa: E402

BLOCKS, BANANA = "tabletop,family=block2absolutelocation", "bananatable"
SEEN = {  # by Stage 0: its domains, those whose words it has in its vocabulary alone, updates for as many scenes of each
    "with": (("tabletop,family=mixed,look=real", "tabletop,family=mixed", "bananatable"), (), 1),
    "without": (("tabletop,family=mixed,look=real", "tabletop,family=mixed"), ("bananatable",), 2 / 3),
}
SETTINGS = ("episodes", "stage0_updates", "updates", "iterations", "eval_episodes")
PAPER = {"stage1": 0.63, "stage2": 0.85}  # success with a real banana, before practice and after it
HOW = {"moved": 0, "turned": 1, "beside": 1, "fallen": 2}  # of `pushes`: digits
PAGE = Path("docs/pretraining.md")


@dataclass
class Config:
    seeds: Count = 2  # seeds 0, 1, ...
    seed: Whole | None = None  # this one alone; nothing is drawn
    stage0: tuple[Literal["with", "without"], ...] = ("with", "without")  # whether Stage 0 has seen a banana
    episodes: Count = 8000  # demonstrations
    stage0_updates: Count = 5000
    updates: Count = 10_000  # of Stage 1
    iterations: Count = 150  # of Stage 2, at most
    eval_episodes: Count = 300  # fresh ones of a measurement
    pilot: bool = False  # everything tiny, in runs/banana-pilot/


# --- measurements -----------------------------------------------------------------------------------------------------
def pushes(pos: np.ndarray, yaw: np.ndarray, tool: np.ndarray, fallen: np.ndarray) -> dict[str, float]:
    """How a banana is pushed: where it was, float (T + 1, N, 2) [m], its yaw (T + 1, N) [rad], the tool (T + 1, N, 2) [m],
    whether it had fallen off the board (T + 1, N).

    moved: mean way of an episode [cm], until a fall; turned: degrees for each cm of it; beside: how far the tool's way
    passes by the banana's middle while it moves it, mean [cm]; both NaN if it never moves. fallen: share of episodes.
    """
    way = np.where(fallen[1:], 0.0, np.linalg.norm(np.diff(pos, axis=0), axis=2))  # (T, N)
    pushed = way > 0.001  # [m]
    total = float(way[pushed].sum())
    told = {
        "moved": 100 * total / pos.shape[1],
        "turned": np.nan,
        "beside": np.nan,
        "fallen": float(fallen[-1].mean()),
    }
    if total:
        told["turned"] = float(np.degrees(np.abs(np.diff(yaw, axis=0))[pushed].sum())) / (100 * total)
        stroke, to_middle = np.diff(tool, axis=0)[pushed], (pos - tool)[:-1][pushed]  # (pushes, 2)
        cross = stroke[:, 0] * to_middle[:, 1] - stroke[:, 1] * to_middle[:, 0]
        told["beside"] = 100 * float(
            (np.abs(cross) / np.maximum(np.linalg.norm(stroke, axis=1), 1e-9)).mean()
        )
    return told


def scene(env: Domain) -> tuple[np.ndarray, ...]:
    """What `pushes` wants of a moment."""
    return env.pos[:, 0].copy(), env.yaw[:, 0].copy(), env.tool.copy(), env.fallen[:, 0].copy()


def how_it_pushes(policy: EFM, env: Domain, episodes: int, seed: int) -> dict[str, float]:
    """`pushes` over fresh episodes, which end in true success or at the horizon."""
    seen = []
    for part, first, generator in chunks(env, episodes, seed):
        steps = []

        def watch(part: Domain = part, steps: list = steps) -> None:
            steps.append(scene(part))

        rollout(policy, None, part, first, generator, lambda d, truth: truth, keep=False, watch=watch)
        steps += steps[-1:] * (env.horizon + 1 - len(steps))  # all episodes have ended
        seen.append([np.stack(each) for each in zip(*steps, strict=True)])
    return pushes(*(np.concatenate(each, 1) for each in zip(*seen, strict=True)))


def how_people_push(episodes: int, seed: int) -> dict[str, float]:
    """`pushes` of the script that demonstrates."""
    env = make_vec(BANANA, episodes, obs="state")
    _, info = env.reset(seed=seed)
    steps, done = [scene(env)], info["is_success"]
    for _ in range(env.horizon):
        _, _, _, _, info = env.step(np.where(done[:, None], 0.0, env.demonstrate()).astype(np.float32))
        done = done | info["is_success"]
        steps.append(scene(env))
    return pushes(*(np.stack(each) for each in zip(*steps, strict=True)))


def measure(taught: Path, practised: Path, domain: str, cfg: Config, seed: int) -> dict[str, float]:
    """A row: both policies' true success in a domain; Stage 1's d and detector there; on bananas also how both push."""
    env = make_vec(domain, 1, obs="images")
    told = before_and_after(taught, practised, env, cfg.eval_episodes, seed)
    told |= judged(taught, env, cfg.eval_episodes, 4 if cfg.pilot else 50, seed)
    for name, run in (("stage1", taught), ("stage2", practised)):
        pushing = dict.fromkeys(HOW, np.nan)
        if domain == BANANA:
            _, policy, _ = load_run(run, 1)
            pushing = how_it_pushes(policy, env, min(100, cfg.eval_episodes), 9 * 10**8 + seed * 10**6)
        told |= {f"{name}_{k}": v for k, v in pushing.items()}
    people = dict.fromkeys(HOW, np.nan)
    if domain == BANANA:
        people = how_people_push(min(100, cfg.eval_episodes), 9 * 10**8 + seed * 10**6)
    return told | {f"script_{k}": v for k, v in people.items()}


# --- training ---------------------------------------------------------------------------------------------------------
def train(cfg: Config, runs: Path, seen: str, seed: int) -> tuple[Path, Path]:
    """The Stage 1 run with blocks and the Stage 2 run with the banana, trained if they are not there."""
    (domain, *also), words, share = SEEN[seen]
    of_stage0 = {"domain": domain, "also": tuple(also), "words": words or None}
    of_stage0["updates"] = round(share * cfg.stage0_updates)
    return taught_and_practised(cfg, f"{runs}/{seen}", seed, of_stage0, BLOCKS, BANANA)


# --- what comes out ---------------------------------------------------------------------------------------------------
def draw(rows: list[dict[str, str]], runs: Path, cfg: Config) -> plt.Figure:
    """Success with the banana before and after practice beside the paper's; steps of a practice episode, from `runs`."""
    fig, (success, steps) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained")
    for i, seen in enumerate(cfg.stage0):
        for k, (stage, colour) in enumerate((("stage1", BLUE), ("stage2", ORANGE))):
            told = [float(row[f"{stage}_success"]) for row in chosen(rows, stage0=seen, domain=BANANA)]
            success.bar(i + 0.4 * k - 0.2, np.mean(told), 0.38, color=colour)
            success.plot([i + 0.4 * k - 0.2] * len(told), told, "o", color="black", ms=2.5)
        colour = {"with": GREEN, "without": ORANGE}[seen]
        for seed in range(cfg.seeds):
            practice = logged(runs / f"{seen}-stage2-s{seed}")
            column = [row["mean_steps"] for row in practice]
            fives = [np.mean(column[max(0, t - 4) : t + 1]) for t in range(len(column))]
            episodes = [row["episodes"] for row in practice]
            steps.plot(episodes, fives, color=colour, label=f"Stage 0 {seen} a banana")
    last = len(cfg.stage0)
    for k, (stage, colour) in enumerate((("stage1", BLUE), ("stage2", ORANGE))):
        label = {"stage1": "Stage 1", "stage2": "after practice"}[stage]
        success.bar(last + 0.4 * k - 0.2, PAPER[stage], 0.38, color=colour, label=label)
    names = [f"Stage 0 {seen}\na banana" for seen in cfg.stage0]
    success.set_xticks(range(last + 1), [*names, "the paper"])
    success.set(ylim=(0, 1), ylabel="success with the banana")
    success.legend(loc="upper left")
    steps.set(xlabel="practice episodes", ylabel="steps of one", ylim=(0, None))
    handles = dict(zip(*steps.get_legend_handles_labels()[::-1], strict=True))  # a line a seed
    steps.legend(handles.values(), handles.keys(), loc="lower left")
    return fig


def summary(rows: list[dict[str, str]], cfg: Config) -> str:
    """Two tables, the mean and, of several seeds, the least and the greatest: how often it succeeds, how it pushes."""
    succeeds, pushing = [], []
    for seen in cfg.stage0:
        for domain, task in ((BANANA, "the banana"), (BLOCKS, "blocks")):
            of_line = chosen(rows, stage0=seen, domain=domain)
            succeeds.append([f"{seen} a banana", task, *cells(of_line, JUDGED)])
        of_banana = chosen(rows, stage0=seen, domain=BANANA)
        who = {"stage1": "Stage 1", "stage2": "after practice", "script": "the demonstrator"}
        for key, name in who.items():
            columns = {f"{key}_{column}": digits for column, digits in HOW.items()}
            pushing.append([f"{seen} a banana", name, *cells(of_banana, columns)])
    head = ["Stage 0", "task", *JUDGED_HEAD]
    how = ["Stage 0", "who", "way [cm]", "turn [degrees/cm]", "beside the middle [cm]", "fallen"]
    return f"{table(head, succeeds)}\n\n{table(how, pushing)}"


def before_and_after_film(taught: Path, practised: Path, path: Path) -> None:
    """The same three scenes with Stage 1's policy, above, and after practice, below."""
    env, films = make_vec(BANANA, 3, obs="images"), []
    for run in (taught, practised):
        _, policy, reward_model = load_run(run, 1)
        films.append(film(policy, reward_model, env, 0, env.temperature, greedy=False))
    save_gif(films, path, env.metadata["render_fps"])


def main(cfg: Config) -> None:
    check(cfg)
    runs, out = Path("runs/banana"), Path("results")
    if cfg.pilot:
        runs = out = Path("runs/banana-pilot")
        cfg.seeds, cfg.episodes = 1, 20
        cfg.stage0_updates, cfg.updates, cfg.iterations, cfg.eval_episodes = 3, 2, 2, 2
    demos.split(cfg.episodes, 1.0)  # its complaints, before anything is trained
    runs.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(cfg).items() if name in SETTINGS}
    rows = []
    for seed in range(cfg.seeds) if cfg.seed is None else [cfg.seed]:
        for seen in cfg.stage0:
            taught, practised = train(cfg, runs, seen, seed)
            for domain in (BANANA, BLOCKS):
                key = {"stage0": seen, "domain": domain, "seed": seed} | settings
                of_row = (taught, practised, domain, cfg, seed)
                rows.append(once(out / "banana.csv", key, lambda of_row=of_row: measure(*of_row)))
    if cfg.seed is not None:
        return
    draw(rows, runs, cfg).savefig(out / "banana.png")
    plt.close("all")
    first = cfg.stage0[0]
    before_and_after_film(runs / f"{first}-stage1-s0", runs / f"{first}-stage2-s0", runs / "banana.gif")
    told = summary(rows, cfg)
    print(told)
    if not cfg.pilot:
        picture = "![Success with the banana, and steps](../results/banana.png)"
        publish(PAGE, "banana", told, cfg.seeds, picture)


if __name__ == "__main__":
    cli(Config, main)
