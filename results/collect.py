"""From runs/ to results/: python results/collect.py adds each run's summary and metrics there and draws the figures.

The runs themselves are made by the commands in results/README.md. Writes summaries.csv (a row per run) and metrics/*.csv
(each run's raw metrics), in which runs that are not in runs/ any more stay, and from these two table.md (the README's),
learning.png (practice, every seed a line), figure3.png and figure8.png.
"""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

OUT = Path("results")
GROUPS = {  # title: runs, and the steps of the scripted expert that goes straight to it
    "pointmass.py": ("pointmass-toy-s", 12.5),
    "pointmass, states": ("pointmass-stage2-s", 13.1),
    "pointmass, images": ("pointmass-images-stage2-s", 13.1),
    "tabletop, states": ("tabletop-stage2-s", 17.1),
    "tabletop, 40 % of the data": ("tabletop-p40-stage2-s", 17.1),
    "tabletop, images": ("tabletop-images-stage2-s", 17.1),
    "aloha, states": ("aloha-stage2-s", 13.6),
}


# the runs of figure3.png, shares of 20,000 demonstrations, and of figure8.png, of 5,000, by model
FIGURE3 = {
    "nano-wide": ("tabletop-10percent", "tabletop-20percent", "tabletop-80percent"),
    "nano-deep": ("tabletop-p10", "tabletop-p40", "tabletop"),
}
FIGURE8 = {"nano-arms": ("aloha-25percent", "aloha-50percent", "aloha")}


def spread(values: list[float], digits: int) -> str:
    """Mean and, in brackets, least and greatest over the seeds."""
    mean, low, high = (f"{v:,.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low}-{high})"


def parse(value: str) -> Any:
    """A cell of summaries.csv as it was in summary.json: a number if it is one."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value


def main() -> None:
    (OUT / "metrics").mkdir(exist_ok=True)
    if not (OUT / "summaries.csv").exists():
        (OUT / "summaries.csv").write_text("run\n")
    with open(OUT / "summaries.csv", newline="") as f:
        by_run = {row["run"]: {k: v if k == "commit" else parse(v) for k, v in row.items() if v} for row in csv.DictReader(f)}
    new: dict[str, dict] = {}
    for run in (p.parent for p in Path("runs").glob("*/summary.json") if re.fullmatch(r".*-s\d+", p.parent.name)):
        new[run.name] = {"run": run.name} | json.loads((run / "summary.json").read_text())
        shutil.copy(run / "metrics.csv", OUT / "metrics" / f"{run.name}.csv")
    again = {name for name in new.keys() & by_run.keys() if new[name]["seconds"] != by_run[name]["seconds"]}
    gone = {name for name, run in by_run.items() if Path(str(run.get("stage1"))).name in again} - new.keys()
    if gone:
        print(f"dropped, their Stage 1 has been run again: {', '.join(sorted(gone))}")
    by_run = {name: run for name, run in by_run.items() if name not in gone} | new
    by_run = dict(sorted(by_run.items()))
    columns = list(dict.fromkeys(key for summary in by_run.values() for key in summary))
    with open(OUT / "summaries.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_run.values())
    groups = {k: [run for run in by_run if re.fullmatch(re.escape(prefix) + r"\d+", run)] for k, (prefix, _) in GROUPS.items()}
    groups = {title: group for title, group in groups.items() if group}
    header = "command|seeds|Stage 1 success|steps|Stage 2 success|steps|practice episodes|environment steps|seconds, all stages"
    lines = ["| " + header.replace("|", " | ") + " |", "|" + "---|" * 9]
    for title, group in groups.items():
        second, toy = [by_run[run] for run in group], title == "pointmass.py"
        first = second if toy else [by_run[Path(s["stage1"]).name] for s in second]
        a, b = ("stage1_", "stage2_") if toy else ("", "")
        seconds = [s["seconds"] if toy else s["seconds"] + f["seconds"] for s, f in zip(second, first, strict=True)]
        cells = [spread([f[a + "success"] for f in first], 3), spread([f[a + "mean_steps"] for f in first], 1),
                 spread([s[b + "success"] for s in second], 3), spread([s[b + "mean_steps"] for s in second], 1),
                 spread([s[b + "episodes"] for s in second], 0), spread([s[b + "env_steps"] for s in second], 0),
                 spread(seconds, 0)]  # fmt: skip
        lines.append(f"| {title} | {len(second)} | " + " | ".join(cells) + " |")
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    fig, axes = plt.subplots(2, len(groups), figsize=(4 * len(groups), 6), sharex="col")
    for (title, group), (top, bottom) in zip(groups.items(), axes.T, strict=True):
        for run, colour in zip(group, plt.get_cmap("viridis")([i / max(1, len(group)) for i in range(len(group))]), strict=True):
            with open(OUT / "metrics" / f"{run}.csv") as f:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
            x = [r["env_steps"] for r in rows]
            top.plot(x, [r["detected"] for r in rows], color=colour, lw=0.9)
            bottom.plot(x, [r["mean_steps"] for r in rows], color=colour, lw=0.9, label=run.split("-")[-1])
        top.set_title(f"{title} (n = {len(group)} seeds)", fontsize=9)
        top.set(ylabel="share of episodes ended by the detector", ylim=(0, 1.05))
        bottom.axhline(GROUPS[title][1], color="#D55E00", ls="--", label="scripted, straight to the goal")
        bottom.set(xlabel="environment steps", ylabel="steps per practice episode", yscale="log")
        bottom.legend(fontsize=7)
        bottom.xaxis.set_major_locator(plt.MaxNLocator(4))
    fig.tight_layout()
    fig.savefig(OUT / "learning.png", dpi=130)
    against_imitation(by_run, "figure3", FIGURE3, "steps (a failure counts 100)", 100, 17.1)
    against_imitation(by_run, "figure8", FIGURE8, "decisions (a failure counts 40)", 40, 13.6)


def against_imitation(by_run: dict[str, dict], name: str, models: dict[str, tuple], ylabel: str, cap: int, expert: float) -> None:
    """Figure 3's first panel, or Figure 8's right one, at our scale: imitation alone and with practice, by episodes of both."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    blue, orange = "#0072B2", "#D55E00"
    for model, prefixes in models.items():
        fill = "none" if model == "nano-deep" else "full"
        pattern = rf"({'|'.join(prefixes)})-stage%d-s\d+"
        starts, ends = ([s for name, s in by_run.items() if re.fullmatch(pattern % stage, name)] for stage in (1, 2))
        shares = sorted({s["episodes"] for s in starts})
        groups = [[s for s in starts if s["episodes"] == n] for n in shares]
        began = [by_run[Path(s["stage1"]).name] for s in ends]
        seeds = [", ".join(str(sum(s["episodes"] == n for s in runs)) for n in shares) for runs in (starts, began)]
        for ax, key in zip(axes, ("success", "mean_steps"), strict=True):
            ax.plot(
                shares, [sum(s[key] for s in g) / len(g) for g in groups], color=blue, lw=1, ls="--" if fill == "none" else "-"
            )
            ax.plot([f["episodes"] for f in starts], [f[key] for f in starts], "o", color=blue, ms=5, fillstyle=fill,
                    label=f"{model}, Stage 1 (n = {seeds[0]} seeds)")  # fmt: skip
            for k, (f, s) in enumerate(zip(began, ends, strict=True)):
                x = [f["episodes"], f["episodes"] + s["episodes"]]
                ax.plot(x, [f[key], s[key]], color=orange, lw=0.7, ls=":")
                ax.plot(x[1:], [s[key]], "s", color=orange, ms=5, fillstyle=fill,
                        label=None if k else f"{model}, Stage 1 + 2 (n = {seeds[1]} seeds)")  # fmt: skip
            drawn = [s.get("temperature", 1.0) for s in starts]  # rows from before there was one
            usual = max(drawn, key=drawn.count, default=1.0)
            for f, temperature in zip(starts, drawn, strict=True):
                if temperature != usual:
                    ax.annotate(f" drawn at {temperature}", (f["episodes"], f[key]), fontsize=7, va="center")
            ax.set(xlabel="episodes, demonstrations and practice")
    axes[0].set(ylabel="true success", ylim=(0, 1.02))
    axes[1].set(ylabel=ylabel, ylim=(0, 1.02 * cap))
    axes[1].axhline(expert, color="0.5", ls="--", lw=1, label="scripted expert")
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(OUT / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
