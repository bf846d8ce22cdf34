"""results/families.py, real2sim.py and banana.py: what they count, draw and tabulate; the pilots."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import stage2
from common import UserError
from envs import make_vec
from envs.tabletop_language import FAMILIES, instructions
from tests import tiny
from tests.test_three_ways import script

banana, families, real2sim = script("banana"), script("families"), script("real2sim")
ROOT = Path(__file__).resolve().parents[1]


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_a_measured_run_is_not_prolonged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/measured").mkdir(parents=True)
    Path("runs/measured/config.json").write_text('{"iterations": 200}')
    cfg = stage2.Config(iterations=300, out="runs/measured")
    with pytest.raises(UserError, match="runs/measured: has --iterations 200, this is 300"):
        families.finish(stage2.main, cfg)


# --- families ---------------------------------------------------------------------------------------------
def test_a_sentence_belongs_to_one_family():
    """So Block2Block demonstrations can be counted by their words."""
    said = [instructions((family,), 4) for family in FAMILIES]
    assert sum(map(len, said)) == len(set().union(*said)) > 1000
    goals = np.array([texts[i] for i, texts in enumerate(said)] + [said[0][-1]])
    assert [families.of_family(goals, family) for family in FAMILIES] == [2, 1, 1, 1, 1]


def told(family: str, share: float, seed: int) -> dict[str, str]:
    n, high = (100 if share == 0.25 else 400), 0.1 * seed + (share == 1.0) * 0.2
    return {"family": family, "share": f"{share:g}", "seed": str(seed), "demonstrations": str(5 * n),
            "block2block_demonstrations": str(n), "stage1_success": f"{0.3 + high}", "stage2_success": f"{0.5 + high}",
            "stage1_mean_steps": "80", "stage2_mean_steps": "40"}  # fmt: skip


def test_the_families_table_and_figure():
    cfg = families.Config(seeds=2, shares=(0.25, 1.0))
    made = [told(family, share, seed) for family in FAMILIES for share in cfg.shares for seed in (0, 1)]
    lines = families.summary(made, cfg).splitlines()
    assert len(lines) == 2 + 10
    assert lines[2] == "| 500 | block2block | 0.35 (0.30-0.40) | 0.55 (0.50-0.60) | 80.0 (80.0-80.0) | 40.0 (40.0-40.0) |"
    fig = families.draw(made, cfg)
    ours, paper, every = fig.axes
    means = [line.get_ydata().tolist() for line in ours.lines if line.get_label() in ("Stage 1", "Stage 1 + 2")]
    assert means == [pytest.approx([0.35, 0.55]), pytest.approx([0.55, 0.75])]
    assert [line.get_ydata()[-1] for line in paper.lines] == [0.585, 0.97]  # the paper's, at 80 %
    assert len(every.patches) == 10
    plt.close(fig)


@pytest.mark.slow
def test_the_families_pilot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny.pilot_twice(families, "families", monkeypatch)
    made = rows(folder / "families.csv")
    assert [(r["share"], r["family"]) for r in made] == [(share, f) for share in ("0.5", "1") for f in FAMILIES]
    with np.load("data/tabletop,family=mixed-state-40-s0-v2.npz") as data:
        said = set(instructions(("block2block",), 4))
        block2block = sum(text in said for text in data["instruction"].tolist())
    assert made[-1]["demonstrations"] == "40" and made[-1]["block2block_demonstrations"] == str(block2block)
    assert 0 < block2block < 40
    practised = json.loads((folder / "1-stage2-s0/config.json").read_text())
    assert practised["domain"] == "tabletop,family=block2block"
    assert json.loads((folder / "1-stage1-s0/config.json").read_text())["domain"] == "tabletop,family=mixed"
    assert "| 40 | separate blocks |" in capsys.readouterr().out


def test_families_refuses_wrong_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shares, complaint in (((), "--shares: name"), ((2.0,), "--shares 2.0: must")):
        with pytest.raises(UserError, match=complaint):
            families.main(families.Config(shares=shares))
    with pytest.raises(UserError, match="--shares: one comes twice"):
        families.main(families.Config(shares=(1.0, 1)))
    with pytest.raises(UserError, match="--data-fraction"):
        real2sim.main(real2sim.Config(episodes=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "page", "mark"), [
    ("families", "docs/results.md", "families"),
    ("figure4", "docs/pretraining.md", "figure 4"),
    ("real2sim", "docs/pretraining.md", "real2sim"),
    ("banana", "docs/pretraining.md", "banana"),
])  # fmt: skip
def test_the_page_has_the_numbers_of_the_csv(name, page, mark):
    """Of the seeds and shares that are there; without a CSV it says so."""
    block = (ROOT / page).read_text().split(f"<!-- {mark} -->\n")[1].split("\n<!-- end -->")[0]
    path = ROOT / f"results/{name}.csv"
    if not path.exists():
        assert block == "Not measured yet."
        return
    made, experiment = rows(path), script(name)
    cfg = experiment.Config()
    if name == "banana":
        cfg.stage0 = tuple(dict.fromkeys(row["stage0"] for row in made))
    elif name != "real2sim":
        cfg.shares = tuple(dict.fromkeys(float(row["share"]) for row in made))
    cfg.seeds = len({row["seed"] for row in made})
    told = experiment.summary(made) if name == "real2sim" else experiment.summary(made, cfg)
    assert block.startswith(told + "\n"), f"run python results/{name}.py"
    assert f"Seed{'s' * (cfg.seeds > 1)} 0" in block and f"../results/{name}.png" in block


# --- Real2Sim ---------------------------------------------------------------------------------------------
def test_what_stage0_has_seen():
    """Both looks or real alone; always the words of every family, so that Stage 1 knows them."""
    looks = {name: {make_vec(domain, 1, obs="images").real for domain in seen} for name, seen in real2sim.SEEN.items()}
    assert looks == {"both": {0.0, 1.0}, "real": {1.0}}
    for domains in real2sim.SEEN.values():
        words = [make_vec(domain, 1, obs="images").instructions() for domain in domains]
        assert set().union(*words) >= set(instructions(FAMILIES, 4))
    assert [make_vec(f"tabletop,look={look:g}", 1).real for look in real2sim.LOOKS] == list(real2sim.LOOKS)


def test_the_real2sim_table_and_figure():
    columns = ("stage1_success", "stage2_success", "stage1_mean_steps", "stage2_mean_steps", "rank_correlation",
               "precision", "recall")  # fmt: skip
    made = [{"look": f"{look:.6g}", **dict.fromkeys(columns, f"{look / 2 + 0.1 * seed}")}
            for look in real2sim.LOOKS for seed in (0, 1)]  # fmt: skip
    lines = real2sim.summary(made).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| real", "| 0.75", "| 0.5", "| 0.25", "| sim"]
    assert lines[2].startswith("| real | 0.55 (0.50-0.60) |")
    fig = real2sim.draw(made, real2sim.Config())
    success, order = fig.axes
    (line,) = [line for line in success.lines if line.get_label() == "Stage 1"]
    assert line.get_ydata().tolist() == pytest.approx([0.55, 0.425, 0.3, 0.175, 0.05])
    assert [line.get_ydata()[0] for line in success.lines if line.get_marker() == "*"] == [0.225, 0.59]
    assert len(order.lines) == 6
    plt.close(fig)


@pytest.mark.slow
def test_the_real2sim_pilot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny.pilot_twice(real2sim, "real2sim", monkeypatch)
    assert [float(r["look"]) for r in rows(folder / "real2sim.csv")] == list(real2sim.LOOKS)
    domains = [json.loads((folder / f"both-{stage}-s0/config.json").read_text())["domain"] for stage in ("stage1", "stage2")]
    assert domains == ["tabletop,look=real", "tabletop,look=sim"]
    seen = json.loads((folder / "both-stage0-s0/config.json").read_text())
    assert (seen["domain"], *seen["also"]) == real2sim.SEEN["both"]
    assert {(r["stage0"], r["updates"]) for r in rows(folder / "real2sim.csv")} == {("both", "2")}
    assert "| sim | " in capsys.readouterr().out


# --- BananaTable ------------------------------------------------------------------------------------------
def test_who_has_seen_a_banana():
    """The control has the same words in its vocabulary, and sees the same scenes but for the banana's, as often."""
    (seen, no_words, whole), (unseen, words, share) = banana.SEEN["with"], banana.SEEN["without"]
    assert set(seen) - set(unseen) == {"bananatable"} == set(words) and no_words == ()
    assert whole * 126 / len(seen) == pytest.approx(share * 126 / len(unseen))  # scenes of each domain
    said = make_vec("bananatable", 1, obs="images").instructions()
    assert not set(said) & set(make_vec(banana.BLOCKS, 1, obs="images").instructions())


def test_how_a_banana_is_pushed():
    """Of three bananas one goes 2 cm and 1 cm to the right and turns a quarter; one stays; one falls, far off."""
    pos = np.zeros((4, 3, 2))
    pos[1:, 0, 1], pos[3, 0, 1], pos[2:, 2, 0] = 0.02, 0.03, -0.8
    yaw = np.zeros((4, 3))
    yaw[3, 0] = np.pi / 2
    tool = np.zeros((4, 3, 2))
    tool[:, 0] = [[0.04, -0.05], [0.04, -0.02], [0.02, 0.0], [0.02, 0.01]]  # it passes by at 4 cm, then at 2 cm
    fallen = np.zeros((4, 3), bool)
    fallen[2:, 2] = True
    told = banana.pushes(pos, yaw, tool, fallen)
    assert told == pytest.approx({"moved": 1.0, "turned": 90 / 3, "beside": 3.0, "fallen": 1 / 3})
    still = banana.pushes(np.zeros((3, 1, 2)), np.zeros((3, 1)), np.zeros((3, 1, 2)), np.zeros((3, 1), bool))
    assert np.isnan(still["turned"]) and np.isnan(still["beside"]) and still["moved"] == still["fallen"] == 0


def test_the_demonstrator_pushes_bananas():
    told = banana.how_people_push(4, 0)
    assert told["moved"] > 5 and told["turned"] > 0.1 and 0 < told["beside"] < 7 and 0 <= told["fallen"] <= 1


def test_the_banana_table_and_figure(tmp_path):
    columns = ["rank_correlation", "precision", "recall", "stage1_mean_steps", "stage2_mean_steps"]
    columns += [f"{who}_{how}" for who in ("stage1", "stage2", "script") for how in banana.HOW]
    made = []
    for seen, more in (("with", 0.2), ("without", 0.0)):
        for domain in (banana.BANANA, banana.BLOCKS):
            for seed in (0, 1):
                row = {"stage0": seen, "domain": domain, "seed": str(seed)} | dict.fromkeys(columns, "2")
                made.append(row | {"stage1_success": f"{0.1 + more}", "stage2_success": f"{0.3 + more + 0.1 * seed}"})
    cfg = banana.Config()
    lines = banana.summary(made, cfg).splitlines()
    assert lines[2].startswith("| with a banana | the banana | 0.30 (0.30-0.30) | 0.55 (0.50-0.60) |")
    assert [line.split(" | ")[:2] for line in lines[9:]] == [
        ["| with a banana", "Stage 1"],
        ["| with a banana", "after practice"],
        ["| with a banana", "the demonstrator"],
        ["| without a banana", "Stage 1"],
        ["| without a banana", "after practice"],
        ["| without a banana", "the demonstrator"],
    ]
    for seen, seed in itertools.product(cfg.stage0, (0, 1)):
        (tmp_path / f"{seen}-stage2-s{seed}").mkdir()
        (tmp_path / f"{seen}-stage2-s{seed}/metrics.csv").write_text("episodes,mean_steps\n8,90\n16,70\n")
    fig = banana.draw(made, tmp_path, cfg)
    success, steps = fig.axes
    heights = [bar.get_height() for bar in success.patches]
    assert heights == pytest.approx([0.3, 0.55, 0.1, 0.35, 0.63, 0.85])  # the last two are the paper's
    assert [line.get_ydata().tolist() for line in steps.lines] == [[90, 80]] * 4
    assert len(steps.get_legend().get_texts()) == 2
    plt.close(fig)


@pytest.mark.slow
def test_the_banana_pilot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny.pilot_twice(banana, "banana", monkeypatch)
    made = rows(folder / "banana.csv")
    assert [(r["stage0"], r["domain"]) for r in made] == [
        (seen, domain) for seen in ("with", "without") for domain in (banana.BANANA, banana.BLOCKS)
    ]
    for seen in ("with", "without"):
        told = [json.loads((folder / f"{seen}-stage{k}-s0/config.json").read_text()) for k in (0, 1, 2)]
        assert ("bananatable" in told[0]["also"]) == (seen == "with")
        assert [each["domain"] for each in told[1:]] == [banana.BLOCKS, banana.BANANA]
    assert (folder / "banana.gif").stat().st_size > 1000 and (folder / "banana.png").exists()
    assert "| without a banana | blocks |" in capsys.readouterr().out
