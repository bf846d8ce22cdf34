"""The README's film: the same scenes before practice (above) and after it (below).

    python results/before_after.py --before runs/tabletop-turned4000-stage1-s0 --after runs/tabletop-turned4000-stage2-s0

Writes results/before_after.gif. Some twenty seconds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError  # noqa: E402 - the repository's root is not installed
from common.cli import cli  # noqa: E402
from common.pictures import save_gif  # noqa: E402
from common.setup import load_run  # noqa: E402
from eval import film  # noqa: E402


@dataclass
class Config:
    before: str = "runs/tabletop-turned4000-stage1-s0"  # folder of a run
    after: str = "runs/tabletop-turned4000-stage2-s0"  # folder of another one in the same domain
    seed: int = 0  # of the scenes and the sampled actions
    episodes: int = 3  # side by side
    out: str = str(Path(__file__).with_name("before_after.gif"))


def main(cfg: Config) -> None:
    films, names = [], []
    for run in (cfg.before, cfg.after):
        env, policy, reward_model = load_run(Path(run), cfg.episodes)
        films.append(film(policy, reward_model, env, cfg.seed, env.temperature, greedy=False))
        names.append(env.name)
    if names[0] != names[1]:
        raise UserError(
            f"--after {cfg.after}: of {names[1]}, and --before is of {names[0]}; name runs of one domain"
        )
    for run, shown in zip((cfg.before, cfg.after), films, strict=True):
        print(run)
        for goal, reached, steps in zip(shown.goals, shown.reached, shown.length, strict=True):
            print(f'  "{goal}": {"reached" if reached else "not reached"}, {steps} steps')
    save_gif(films, Path(cfg.out), env.metadata["render_fps"])
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    cli(Config, main)
