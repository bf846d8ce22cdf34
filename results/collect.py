"""From runs/ to results/ and the pages: `python results/collect.py`. Some ten seconds.

1. Adds each finished run in runs/ to summaries.csv (a row a run) and to metrics/ (its raw metrics.csv). Runs that
   are not in runs/ any more stay, unless their Stage 1 has been run again.
2. Writes the tables between `<!-- collected: NAME -->` and `<!-- end -->` in README.md and docs/results.md,
   and the README's numbers of lines.
3. Draws learning.png, figure3.png and figure8.png, and copies the pictures that eval.py made of some runs.
   A picture shows on its page, at `<!-- collected: picture NAME -->`, as soon as it is in results/.
"""

import contextlib
import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.pictures import BLUE, ORANGE, WIDTH, plt  # noqa: E402 - the repository's root is not installed

OUT = Path("results")
PAGES = (Path("README.md"), Path("docs/results.md"))
TOY = "pointmass.py"
EARLIER = " (old)"  # measured before symmetries and a measured s
GROUPS = {  # title: the Stage 2 runs but for their seed, their scripted expert's row in experts.csv, a remark
    TOY: ("pointmass-toy", "pointmass.py", ""),
    "pointmass, states": ("pointmass-stage2", "pointmass", ""),
    "pointmass, images": ("pointmass-images-stage2", "pointmass", EARLIER),
    "tabletop, states": ("tabletop-turned4000-stage2", "tabletop family=block2block blocks=4", ""),
    "tabletop, images": ("tabletop-images-stage2", "tabletop family=block2block blocks=4", ""),
    "aloha": ("aloha-stage2", "aloha", ""),
}
MORE = {  # further screens of docs/results.md, not in the README's table
    "tabletop, 20,000": ("tabletop-stage2", "", ""),
    "tabletop, 2,000 turned": ("tabletop-turned2000-stage2", "", ""),
    "tabletop, operator": ("tabletop-operator-stage2", "", ""),
    "tabletop, images, earlier": ("tabletop-images-earlier-stage2", "", ""),
    "tabletop, images, twice the data": ("tabletop-images-continued-stage2", "", ""),
    "tabletop, images, GPU": ("tabletop-images-gpu-stage2", "", ""),
    "aloha, earlier physics": ("aloha-earlier-stage2", "", ""),
    "aloha, timed": ("aloha-timed-stage2", "", ""),
}
FIGURE3 = {  # a panel: the runs but for stage and seed
    "rearranged": ("tabletop-few40", "tabletop-few60"),
    "not turned": (
        "tabletop-unturned125",
        "tabletop-turned500",
        "tabletop-turned1000",
        "tabletop-turned4000",
    ),
    "nano-wide (old)": ("tabletop-10percent", "tabletop-20percent", "tabletop-80percent"),
    "nano-deep (old)": ("tabletop-p10", "tabletop-p40", "tabletop"),
}
EARLIER_TURNS = {  # in the table alone: the other blocks stay; then also less training, about the middle, of least loss
    "turned and moved": ("tabletop-moved40", "tabletop-moved60", "tabletop-moved125", "tabletop-moved250"),
    "turned, first": ("tabletop-d250", "tabletop-d350", "tabletop-d500", "tabletop-d1000", "tabletop-d4000"),
}
POINTMASS = {  # its table of shares
    "turned": ("pointmass-few30", "pointmass-few100", "pointmass-few300", "pointmass"),
    "not turned": ("pointmass-unturned300", "pointmass-unturned"),
}
FIGURE8 = {"nano-arms": ("aloha-50percent", "aloha")}  # of 5,000
EARLIER_PHYSICS = {  # in the table alone
    "earlier physics": ("aloha-earlier-25percent", "aloha-earlier-50percent", "aloha-earlier"),
}
ABLATIONS = (
    "",
    "--gamma 0",
    "--gamma 1",
    "--success-threshold 3",
    "--no-keep-optimizer",
    "--episodes 1000",
)  # README's
# name: the run that eval.py drew it of, if one did, and what it shows
PICTURES = {
    "before_after.gif": ("", "The same scenes before practice, above, and after it, below"),
    "trajectories.png": ("pointmass-stage2-s0/trajectories.png", "Eight episodes after practice"),
    "images_trajectories.png": (
        "pointmass-images-stage2-s0/trajectories.png",
        "Eight episodes after practice",
    ),
    "tabletop_trajectories.png": (
        "tabletop-turned4000-stage2-s0/trajectories.png",
        "Eight episodes after practice",
    ),
    "tabletop_steps_to_go.png": (
        "tabletop-turned4000-stage2-s0/steps_to_go.png",
        "d over an episode after practice",
    ),
    "tabletop_images_trajectories.png": (
        "tabletop-images-stage2-s0/trajectories.png",
        "Eight episodes after practice",
    ),
    "aloha_trajectories.png": ("aloha-stage2-s0/trajectories.png", "Eight episodes after practice"),
}
Runs = dict[str, dict[str, Any]]  # name: summary.json


# --- rows -------------------------------------------------------------------------------------------------------------
def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def parse(value: str) -> Any:
    """A cell of summaries.csv as it was in summary.json: a number if it is one."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value


def collect() -> Runs:
    """summaries.csv and metrics/ with what is in runs/."""
    runs: Runs = {}
    for row in read(OUT / "summaries.csv"):
        runs[row["run"]] = {k: v if k == "commit" else parse(v) for k, v in row.items() if v}
    new: Runs = {}
    for path in Path("runs").glob("*/summary.json"):
        name = path.parent.name
        if re.fullmatch(r".*-s\d+", name):
            new[name] = {"run": name} | json.loads(path.read_text())
            shutil.copy(path.parent / "metrics.csv", OUT / "metrics" / f"{name}.csv")
    again = {name for name in new.keys() & runs.keys() if new[name]["seconds"] != runs[name]["seconds"]}
    stale = {name for name, run in runs.items() if Path(str(run.get("stage1"))).name in again} - new.keys()
    if stale:
        print(f"dropped, their Stage 1 has been run again: {', '.join(sorted(stale))}")
    for name in stale:
        del runs[name]
        (OUT / "metrics" / f"{name}.csv").unlink(missing_ok=True)
    runs = dict(sorted((runs | new).items()))
    columns = list(dict.fromkeys(key for run in runs.values() for key in run))
    with open(OUT / "summaries.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs.values())
    return runs


def group(runs: Runs, prefix: str) -> list[tuple[dict, dict]]:
    """(Stage 1's row, Stage 2's row) of each seed; the toy's one row is taken apart."""
    pairs = []
    for name, run in runs.items():
        if not re.fullmatch(re.escape(prefix) + r"-s\d+", name):
            continue
        if prefix == "pointmass-toy":
            halves = [
                {k.removeprefix(s): v for k, v in run.items() if k.startswith(s)}
                for s in ("stage1_", "stage2_")
            ]
            pairs.append(
                (
                    halves[0] | {"seconds": 0, "run": name},
                    halves[1] | {"seconds": run["seconds"], "run": name},
                )
            )
        else:
            pairs.append((runs[Path(run["stage1"]).name], run))
    return pairs


def expert_steps() -> dict[str, float]:
    steps = {
        "pointmass.py": 12.5
    }  # its PD controller, straight to the goal; tests/test_pointmass.py measures it
    for row in read(OUT / "experts.csv"):
        if row["who"] == "expert":
            steps[f"{row['domain']} {row['settings']}".strip()] = float(row["mean_steps_of_successes"])
    return steps


# --- tables -----------------------------------------------------------------------------------------------------------
def table(header: str, rows: list[list[str]]) -> str:
    lines = [header.split("|"), ["---"] * len(header.split("|")), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def spread(rows: list[dict], key: str, digits: int) -> str:
    """Mean and, in brackets, the least and greatest seed; of one seed its 95 % interval."""
    low, high = (min(r[key] for r in rows), max(r[key] for r in rows))
    if len(rows) == 1:
        low, high = rows[0].get(f"{key}_low", low), rows[0].get(f"{key}_high", high)
    return f"{mean(rows, key):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def results_table(runs: Runs) -> str:
    rows, experts = [], expert_steps()
    for title, (prefix, expert, remark) in GROUPS.items():
        pairs = group(runs, prefix)
        if pairs:
            first, second = ([pair[stage] for pair in pairs] for stage in (0, 1))
            steps = f"{mean(first, 'mean_steps'):.1f} → {mean(second, 'mean_steps'):.1f}"
            rows.append([title + remark, str(len(pairs)), spread(first, "success", 2), spread(second, "success", 2),
                         steps, f"{experts[expert]:.1f}", f"{mean(second, 'episodes'):,.0f}"])  # fmt: skip
    return table("domain|seeds|imitation|after practice|steps|expert|practice episodes", rows)


def seeds_table(runs: Runs, prefix: str) -> str:
    rows = []
    for first, second in group(runs, prefix):
        success = [
            f"{r['success']:.3f} ({r['success_low']:.3f}-{r['success_high']:.3f})" for r in (first, second)
        ]
        steps = [f"{r['mean_steps']:.1f}" for r in (first, second)]
        confirmed = [
            f"{r['confirmed_detections']:.2f}" if "confirmed_detections" in r else "" for r in (first, second)
        ]
        minutes = " + ".join(f"{r['seconds'] / 60:.0f}" for r in (first, second) if r["seconds"])
        rows.append([second["run"].rsplit("-s", 1)[1], success[0], steps[0], success[1], steps[1],
                     f"{second['episodes']:,}", " ".join(confirmed).strip(), minutes])  # fmt: skip
    return table("seed|imitation|steps|after practice|steps|episodes|confirmed|minutes", rows)


def shares_table(runs: Runs, panels: dict[str, tuple]) -> str:
    rows = []
    for title, prefixes in panels.items():
        for prefix in prefixes:
            for name, first in runs.items():
                if re.fullmatch(re.escape(prefix) + r"-stage1-s\d+", name):
                    second = runs.get(name.replace("stage1", "stage2"))
                    cells = [f"{r['success']:.3f} ({r['success_low']:.3f}-{r['success_high']:.3f})" if r else "-"
                             for r in (first, second)]  # fmt: skip
                    told = [f"{r['mean_steps']:.1f}" if r else "-" for r in (first, second)]
                    more = [
                        f"{first['confirmed_detections']:.2f}",
                        f"{second['episodes']:,}" if second else "-",
                    ]
                    rows.append([title, f"{first['episodes']:,}", name.rsplit("-s", 1)[1], cells[0], told[0], cells[1],
                                 told[1], *more])  # fmt: skip
    return table("model|demonstrations|seed|imitation|steps|after practice|steps|confirmed|episodes", rows)


def ablations_table(chosen: Callable[[str], bool]) -> str:
    rows: dict[str, list[dict]] = {}
    for row in read(OUT / "pointmass_ablations.csv"):
        if chosen(row["flags"]):
            rows.setdefault(row["flags"], []).append({k: parse(v) for k, v in row.items()})
    cells = []
    for flags, seeds in rows.items():
        title = f"`{flags}`" if flags else "default"
        cells.append(
            [
                title,
                str(len(seeds)),
                spread(seeds, "stage2_success", 3),
                spread(seeds, "stage2_mean_steps", 1),
            ]
        )
    return table("flags|seeds|success after practice|steps", cells)


def experts_table() -> str:
    rows = []
    for row in read(OUT / "experts.csv"):
        rows.append([row["domain"], row["settings"], row["who"], f"{row['success']} ({row['low']}-{row['high']})",
                     row["mean_steps_of_successes"]])  # fmt: skip
    return table("domain|settings|who|success|steps", rows)


def counted(row: re.Match) -> str:
    """A row of the reading list with the file's number of lines, where it is more than a tenth off."""
    lines = len((Path(__file__).resolve().parent.parent / row[2]).read_text().splitlines())
    said = int(row[3])
    return row[0] if abs(lines - said) <= max(10, said // 10) else f"{row[1]}{round(lines, -1)} |"


def fill(page: Path, tables: dict[str, str]) -> None:
    """Puts each table and picture between its marks, where the page has them, and lines into the reading list."""
    tables = dict(tables)
    for name, (_, shows) in PICTURES.items():
        file = Path(*[".."] * (len(page.parts) - 1)) / OUT / name
        tables[f"picture {name}"] = f"![{shows}]({file.as_posix()})" if (OUT / name).exists() else ""
    text = re.sub(r"^(\| `(\w+\.py)` \| )(\d+) \|", counted, page.read_text(), flags=re.M)
    for name in re.findall(r"<!-- collected: (.*?) -->", text):
        block = rf"(<!-- collected: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(
            block,
            lambda m, name=name: "\n".join(filter(None, (m[1].rstrip(), tables[name], m[2]))),
            text,
            flags=re.S,
        )
    page.write_text(text)


def soon(runs: Runs) -> str:
    """Practice episodes until the mean of five iterations is half of the steps that Stage 1's policy truly takes.

    Not of old rows: at their s many an episode ends too early.
    """
    rows = []
    for title, (prefix, _, remark) in GROUPS.items():
        cells = []
        for first, second in group(runs, prefix) if remark != EARLIER else []:
            practice = read(OUT / "metrics" / f"{second['run']}.csv")
            steps = [float(row["mean_steps"]) for row in practice]
            at = "never"
            for i in range(4, len(steps)):
                if 5 * first["mean_steps"] / 2 >= sum(steps[i - 4 : i + 1]):
                    at = f"{int(float(practice[i]['episodes'])):,}"
                    break
            cells.append(at)
        if cells:
            rows.append([title, ", ".join(cells)])
    return table("domain|practice episodes until half of the steps, by seed", rows)


# --- figures ----------------------------------------------------------------------------------------------------------
def learning(runs: Runs) -> plt.Figure:
    """A row a domain: shares of practice episodes, with evaluated success at both ends; steps. Every seed a line."""
    titles = [title for title, (prefix, *_) in GROUPS.items() if group(runs, prefix)]
    size = WIDTH, 1.75 * len(titles) + 0.5
    fig, axes = plt.subplots(len(titles), 2, figsize=size, layout="constrained", squeeze=False)
    experts = expert_steps()
    for title, (left, right) in zip(titles, axes, strict=True):
        prefix, expert, remark = GROUPS[title]
        pairs = group(runs, prefix)
        for first, second in pairs:
            rows = [
                {k: float(v) for k, v in row.items()}
                for row in read(OUT / "metrics" / f"{second['run']}.csv")
            ]
            x = [row["env_steps"] / 1000 for row in rows]
            left.plot(x, [row["detected"] for row in rows], color=ORANGE, lw=0.8)
            left.plot(x, [row["true_at_end"] for row in rows], color=BLUE, lw=0.8)
            left.plot(
                [0, x[-1]],
                [first["success"], second["success"]],
                "s:",
                color=BLUE,
                ms=4,
                lw=0.6,
                clip_on=False,
            )
            right.plot(x, [row["mean_steps"] for row in rows], color=BLUE, lw=0.8)
        left.set(ylim=(-0.03, 1.05), ylabel="share of episodes", title=f"{title}{remark} (n = {len(pairs)})")
        right.axhline(experts[expert], color="0.3", ls="--", lw=1)
        right.text(0.99, experts[expert], "scripted expert ", transform=right.get_yaxis_transform(),
                   ha="right", va="top", fontsize=8)  # fmt: skip
        right.set(ylim=(0, None), ylabel="steps", title="steps of a practice episode")
    for ax in axes[-1]:
        ax.set_xlabel("environment steps [thousands]")
    names = {"detected": (ORANGE, "-", ""), "true at the end": (BLUE, "-", ""),
             "true success, evaluated before and after": (BLUE, ":", "s")}  # fmt: skip
    lines = [
        plt.Line2D([], [], color=c, ls=ls, marker=m, ms=4, label=name) for name, (c, ls, m) in names.items()
    ]
    fig.legend(handles=lines, loc="outside lower center", ncols=3)
    return fig


def against_imitation(
    runs: Runs, panels: dict[str, tuple], steps: str, cap: int, expert: float
) -> plt.Figure:
    """Imitation alone and with practice, by episodes of both kinds: the paper's Figure 3, or Figure 8's right half."""
    how = {"layout": "constrained", "squeeze": False, "sharex": True}
    if len(panels) == 1:  # success and steps side by side
        fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), **how)
        axes = axes.T
    else:  # one above the other, a model a column
        fig, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 5.2), sharey="row", **how)
    for column, (title, prefixes) in zip(axes.T, panels.items(), strict=True):
        firsts, pairs = [], []
        for prefix in prefixes:
            firsts += [
                run for name, run in runs.items() if re.fullmatch(re.escape(prefix) + r"-stage1-s\d+", name)
            ]
            pairs += group(runs, f"{prefix}-stage2")
        by_size: dict[int, list[dict]] = {}
        for first in firsts:
            by_size.setdefault(first["episodes"], []).append(first)
        for ax, key in zip(column, ("success", "mean_steps"), strict=True):
            ax.plot(list(by_size), [mean(rows, key) for rows in by_size.values()], "--", color=BLUE, lw=1)
            ax.plot(
                [r["episodes"] for r in firsts],
                [r[key] for r in firsts],
                "o",
                color=BLUE,
                ms=5,
                label="imitation",
            )
            for k, (first, second) in enumerate(pairs):
                x = [first["episodes"], first["episodes"] + second["episodes"]]
                ax.plot(x, [first[key], second[key]], ":", color=ORANGE, lw=0.8)
                ax.plot(
                    x[1:], [second[key]], "s", color=ORANGE, ms=5, label="" if k else "imitation and practice"
                )
            ax.set_xscale("log")
            ax.grid(alpha=0.3)
        counts = ", ".join(f"{len(rows)} at {n:,}" for n, rows in by_size.items())
        told = f"seeds: {counts}" if len(panels) == 1 else f"{len(firsts)} policies"
        column[0].set_title(f"{title}\n{told}", fontsize=8)
        column[0].set_ylim(0, 1.03)
        column[1].set_ylim(0, 1.03 * cap)
        for ax in column[-1:] if len(panels) > 1 else column:
            ax.set_xlabel("demonstrations + practice")
        column[1].axhline(expert, color="0.3", ls="--", lw=1)
        column[1].text(
            0.02,
            expert,
            "scripted expert",
            transform=column[1].get_yaxis_transform(),
            va="bottom",
            fontsize=8,
        )
        ticks = sorted(by_size) if len(panels) == 1 else [40, 400, 4000]
        column[1].set_xticks(ticks, [f"{n:,}" for n in ticks])
        column[1].minorticks_off()
    axes[0, 0].set_ylabel("true success")
    axes[1, 0].set_ylabel(steps)
    named = {}  # a panel may lack practice
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    fig.legend(named.values(), named.keys(), loc="outside lower center", ncols=2)
    return fig


def main() -> None:
    (OUT / "metrics").mkdir(exist_ok=True)
    runs = collect()
    tables = {
        "results": results_table(runs),
        "figure3": shares_table(runs, FIGURE3 | EARLIER_TURNS),
        "figure8": shares_table(runs, FIGURE8 | EARLIER_PHYSICS),
        "pointmass, fewer": shares_table(runs, POINTMASS),
        "ablations": ablations_table(lambda flags: True),
        "five ablations": ablations_table(lambda flags: flags in ABLATIONS),
        "experts": experts_table(),
        "soon": soon(runs),
    }
    for title, (prefix, *_) in (GROUPS | MORE).items():
        tables[title] = seeds_table(runs, prefix)
    for name, (source, _) in PICTURES.items():
        if source and (Path("runs") / source).exists():
            shutil.copy(Path("runs") / source, OUT / name)
    for page in PAGES:
        fill(page, tables)
    print(tables["results"])

    experts = expert_steps()
    learning(runs).savefig(OUT / "learning.png")
    block2block = experts["tabletop family=block2block blocks=4"]
    against_imitation(runs, FIGURE3, "steps (a failure counts 100)", 100, block2block).savefig(
        OUT / "figure3.png"
    )
    decisions = "decisions (a failure counts 40)"
    against_imitation(runs, FIGURE8, decisions, 40, experts["aloha"]).savefig(OUT / "figure8.png")


if __name__ == "__main__":
    main()
