"""LoRA, several processes, bfloat16, checkpointed activations, torch.compile: the same numbers, cheaper."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import envs
import eval as evaluation
import model as models
import stage1
import stage2
from common import UserError, cli, demos, ranks, setup
from common import weights as files
from model import EFM, EFMConfig
from tests.test_cli import call
from tests.test_weights import build, save
from tests.tiny import SIZES, metrics, tiny_presets
from tests.two_ranks import run, short
from tokens import StepsToGo, Tokenizer

RANGES = [(0, 21)] * 2
STEPS = StepsToGo(140, 140)


def small(seed: int = 0, **sizes) -> EFM:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(envs.make_vec("pointmass", 1, obs="images").instructions())
    return EFM(EFMConfig(**SIZES | {"depth": 2, "image_size": 32} | sizes), tokenizer)


def see(B: int = 3) -> tuple[dict[str, Tensor], list[str]]:
    images = torch.randint(0, 256, (B, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"images": images}, ["move to the red goal", "move to the blue goal", "move to the green goal"][:B]


def answers(model: EFM) -> list[Tensor]:
    """What the stages ask of a model: log p of an answer, d(o, g), features, a sample and its entropy."""
    obs, goals = see()
    with torch.no_grad():
        return [
            model.log_prob(obs, goals, torch.tensor([[3, 4]] * 3), RANGES),
            model.steps_to_go(obs, goals, STEPS),
            model.encode_images(obs["images"]),
            *model.sample(obs, goals, RANGES, torch.Generator().manual_seed(0)),
        ]


def gradients(model: EFM) -> dict[str, Tensor]:
    model.zero_grad()
    obs, goals = see()
    model.log_prob(obs, goals, torch.tensor([[3, 4]] * 3), RANGES).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def disturb(model: EFM, seed: int) -> EFM:
    """As if the adapters had been trained."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if files.LORA in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


# --- LoRA -------------------------------------------------------------------------------------------------
def test_an_adapter_is_zero_at_first_and_only_adapters_learn(torchvision_ops, tmp_path):
    model = small()
    before, start = answers(model), {k: v.clone() for k, v in model.state_dict().items()}
    files.add_lora(model, 4, tmp_path / "base.safetensors")
    for a, b in zip(answers(model), before, strict=True):  # sums in another order, as tensors lie otherwise in memory
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)
    assert all(p.any() == ("lora_A" in name) for name, p in model.named_parameters() if p.requires_grad)
    linear = {n for n, m in small().named_modules() if isinstance(m, torch.nn.Linear)} - {"multi_modal_projector"}
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.split(files.LORA)[0] for n in learnt} == linear and len(learnt) == 2 * len(linear)
    assert set(files.trainable_state(model)) == learnt
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # B is zero, so that A learns from the second update on
        assert set(gradients(model)) == learnt
        optimizer.step()
    files.save_base(model, tmp_path / "base.safetensors")
    base = files.load_model(tmp_path / "base.safetensors")
    assert base.state_dict().keys() == start.keys()
    assert all(torch.equal(v, start[k]) for k, v in base.state_dict().items())
    for x, y in zip(answers(model)[:3], before[:3], strict=True):
        assert not torch.allclose(x, y)


def test_merged_equals_unmerged(torchvision_ops, tmp_path):
    model = disturb(files.add_lora(small(), 4, tmp_path / "base.safetensors"), 1)
    merged = files.merge_lora(copy.deepcopy(model))
    assert merged.state_dict().keys() == small().state_dict().keys() and all(p.requires_grad for p in merged.parameters())
    for a, b in zip(answers(merged), answers(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    files.save_model(merged, tmp_path / "merged.safetensors")
    assert torch.equal(answers(files.load_model(tmp_path / "merged.safetensors"))[0], answers(merged)[0])


def test_one_copy_of_the_weights_serves_policy_and_reward(torchvision_ops, tmp_path):
    policy = files.add_lora(small(), 4, tmp_path / "stage1" / "base.safetensors")
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
    files.save_base(policy, policy.base)
    files.save_model(disturb(policy, 1), tmp_path / "stage2" / "policy.safetensors")
    saved = [answers(policy)]
    files.save_model(disturb(policy, 2), tmp_path / "stage1" / "reward.safetensors")
    saved.append(answers(policy))
    os.rename(tmp_path, elsewhere := tmp_path.with_name(f"{tmp_path.name} elsewhere"))  # the base is named relative to them
    policy = files.load_model(elsewhere / "stage2" / "policy.safetensors")
    reward = files.load_model(elsewhere / "stage1" / "reward.safetensors", policy)
    for model, before in zip((policy, reward), saved, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(answers(model), before, strict=True))
    for (name, p), (_, r) in zip(policy.named_parameters(), reward.named_parameters(), strict=True):
        assert (p is r) == (files.LORA not in name), name
    alone = files.load_model(elsewhere / "stage1" / "reward.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(answers(alone), saved[1], strict=True))
    disturb(policy, 3)
    assert all(torch.equal(a, b) for a, b in zip(answers(reward), saved[1], strict=True))
    policy.base.unlink()
    with pytest.raises(ValueError, match="base.safetensors: no such checkpoint"):
        files.load_model(elsewhere / "stage2" / "policy.safetensors")


def test_an_adapter_is_merged_before_it_goes_to_the_hub(torchvision_ops, tmp_path, monkeypatch):
    model = files.add_lora(small(), 4, tmp_path / "base.safetensors")
    files.save_base(model, model.base)
    files.save_model(disturb(model, 1), tmp_path / "policy.safetensors")
    sent = []

    def hub(call, repo, path_or_fileobj=None, **_):
        if path_or_fileobj:
            sent.append(files.load_model(Path(path_or_fileobj)))

    monkeypatch.setattr(files, "hub", hub)
    files.push(tmp_path / "policy.safetensors", "me/robot")
    assert sent[0].lora_rank == 0
    torch.testing.assert_close(answers(sent[0])[0], answers(model)[0], atol=1e-4, rtol=1e-5)


def test_without_peft(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="^--lora-rank 4: .*peft.*; pip install peft$"):
        setup.adapt(small(), 4, tmp_path)


# --- the stages with adapters -----------------------------------------------------------------------------
ONE = {
    "obs": "images",
    "model": "paligemma",
    "episodes": 20,
    "updates": 6,
    "batch": 8,
    "eval_every": 2,
    "lr": 1e-1,
}
TWO = {"iterations": 6, "updates": 2, "batch": 8, "num_envs": 4, "first_look": 4, "success_threshold": 69.0, "lr": 1e-2}


@pytest.fixture(scope="module")
def here(torchvision_ops, tmp_path_factory):
    """The present folder: weights/ of a tiny PaliGemma, runs of both stages with adapters and without."""
    with tiny_presets(), pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("here"))
        for obs in ("images", "state"):
            demos.load_demonstrations(stage1.Config(domain="pointmass", obs=obs, episodes=20))
        save(build("grouped"), Path("weights"))
        short(m.setattr)
        run("stage1", **ONE, weights="weights", lora_rank=4, out="runs/lora1", cut=2)
        run("stage2", **TWO, stage1="runs/lora1", out="runs/lora2", cut=2)
        run("stage1", **ONE, weights="weights", out="runs/full1")
        yield Path.cwd()


def weights(run: str, name: str = "policy") -> dict[str, Tensor]:
    return safetensors.torch.load_file(f"runs/{run}/{name}.safetensors")


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


def test_runs_with_adapters(here):
    start = files.load_paligemma("weights").state_dict()
    base = files.load_model(Path("runs/lora1/base.safetensors")).state_dict()
    assert not changed(start, base)
    first, second = weights("lora1"), weights("lora2")
    assert all(files.LORA in k for k in first) and not changed(weights("lora1", "reward"), weights("lora2", "reward"))
    assert changed(first, second) == {k for k in first if k.startswith("language_model.")}  # the ViT's adapters are frozen
    assert all(v.abs().max() > 0 for v in first.values())  # but learnt in Stage 1
    assert json.loads(Path("runs/lora2/config.json").read_text())["lora_rank"] == 4
    assert not Path("runs/lora2/base.safetensors").exists()
    state = torch.load("runs/lora2/resume.pt", weights_only=True)
    assert state["policy"].keys() == first.keys()
    env, policy, reward = setup.load_run(Path("runs/lora2"), 2)
    assert policy.get_parameter("language_model.embed_tokens.weight") is reward.get_parameter(
        "language_model.embed_tokens.weight"
    )
    assert np.isfinite(float(metrics(Path("runs/lora2"))[-1][-1]))


def test_new_adapters_on_a_stage_1_without(here):
    run("stage2", **TWO, stage1="runs/full1", lora_rank=2, out="runs/new2")
    assert all(files.LORA in k for k in weights("new2"))
    assert not changed(weights("full1", "reward"), weights("new2", "reward"))
    start, policy = weights("full1"), files.load_model(Path("runs/new2/policy.safetensors"))
    for name, p in policy.named_parameters():
        if files.LORA not in name:
            assert torch.equal(p, start[name.replace(".base_layer", "")]), name
    setup.load_run(Path("runs/new2"), 2)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_frame_is_encoded_before_the_update_not_in_it(here, stage, monkeypatch, tmp_path):
    """Stage 1 trains the ViT's adapters; Stage 2 feeds kept features to the policy."""
    seen, forward = [], models.ViT.forward
    monkeypatch.setattr(models.ViT, "forward", lambda self, x: seen.append(torch.is_grad_enabled()) or forward(self, x))
    settings = ONE | {"weights": "weights", "lora_rank": 4, "updates": 1} if stage == "stage1" else TWO | {"stage1": "runs/lora1"}
    run(stage, **settings, out=str(tmp_path / "run"))
    assert any(seen) == (stage == "stage1") and not all(seen)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_adapters_resume_exactly(here, stage):
    settings = ONE | {"weights": "weights", "lora_rank": 4} if stage == "stage1" else TWO | {"stage1": "runs/lora1"}
    whole = f"lora{stage[-1]}"
    run(stage, **settings, out=f"runs/{whole}-cut", resume=True)
    assert metrics(Path(f"runs/{whole}-cut")) == metrics(Path(f"runs/{whole}"))
    for name in ("policy", "reward"):
        assert not changed(weights(f"{whole}-cut", name), weights(whole, name))


def test_adapters_go_on_with_stage_1s_moments(here):
    run("stage2", **TWO | {"iterations": 1}, stage1="runs/lora1", keep_optimizer=True, out="runs/moments")
    state = torch.load("runs/moments/resume.pt", weights_only=True)["optimizer"]["state"]
    assert {float(s["step"]) for s in state.values()} == {6.0, 8.0}  # the ViT's adapters stand still


@pytest.mark.parametrize(("script", "args", "culprit"), [
    (stage1, "--lora-rank 4", "--lora-rank 4: needs a model pre-trained"),
    (stage1, "--lora-rank -1", "--lora-rank -1"),
    (stage1, "--lora_rank 4 --vit timm:vit_base_patch16_siglip_224", "--lora-rank 4"),
    (stage2, "--stage1 runs/lora1 --lora-rank 2", "--lora-rank 2: runs/lora1 has adapters of rank 4"),
    (stage2, "--stage1 runs/full1 --lora-rank 2 --keep-optimizer", "--keep-optimizer"),
    (stage2, "--stage1 runs/lora1 --lora-rank x", "--lora-rank")])  # fmt: skip
def test_wrong_adapters(here, capsys, script, args, culprit):
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        call(script, [*args.split(), "--out", "runs/wrong"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and culprit in error
    assert sorted(here.rglob("*")) == before


# --- several processes ------------------------------------------------------------------------------------
STATES = {
    "obs": "state",
    "episodes": 20,
    "updates": 6,
    "batch": 15,
    "eval_every": 2,
    "lr": 1e-1,
}  # unequal shares
RUNS = {
    "states-two": ("stage1", STATES, "states-one"),
    "sharded-two": ("stage1", ONE | {"weights": "weights"}, "full1"),
    "adapters-two": ("stage1", ONE | {"weights": "weights", "lora_rank": 4}, "lora1"),
}
PRACTICE = ["states-one", "full1", "lora1"]  # by DDP, by FSDP2, of adapters


@pytest.fixture(scope="module")
def two_ranks(here) -> Path:
    """Runs of two processes, and what a kill would leave of them; Stage 2's go on from one process's Stage 1."""
    run("stage1", **STATES, out="runs/states-one")
    jobs = [{"stage": stage, **settings, "out": f"runs/{name}", "cut": 2} for name, (stage, settings, _) in RUNS.items()]
    for name in PRACTICE:
        job = {"stage": "stage2", **TWO, "stage1": f"runs/{name}"}
        jobs += [
            job | {"out": f"runs/2-{name}", "cut": 3},
            job | {"out": f"runs/2-{name}-cut", "resume": True, "cut": 2},
        ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"]
    script = Path(__file__).with_name("two_ranks.py")
    p = subprocess.run([*command, str(script), json.dumps(jobs)], capture_output=True, text=True, timeout=300, check=False)
    assert p.returncode == 0, p.stderr
    return here


def assert_close(a: str, b: str) -> None:
    """metrics.csv to 1e-5, whose six digits allow no more; and weights."""
    rows = [np.array(metrics(Path(f"runs/{x}"))[1:], float) for x in (a, b)]
    assert len(rows[0]) > 1 and len(np.unique(rows[0][:, 1])) > 1
    np.testing.assert_allclose(*rows, rtol=1e-5)
    for name in ("policy", "reward"):
        theirs = weights(b, name)
        for key in theirs.keys() - {k for k in theirs if k.endswith("k_proj.bias")}:  # softmax does not see it: AdamW on noise
            value = weights(a, name)[key]
            torch.testing.assert_close(value, theirs[key], atol=1e-3, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(two_ranks, name):
    assert_close(name, RUNS[name][2])


@pytest.mark.parametrize("name", RUNS)
def test_one_process_goes_on_where_two_were_killed(two_ranks, name):
    stage, settings, one = RUNS[name]
    assert not Path(f"runs/{name}-cut/summary.json").exists()
    assert torch.load(f"runs/{name}-cut/resume.pt", weights_only=True)["progress"]["update"] == 4
    run(stage, **settings, out=f"runs/{name}-cut", resume=True)
    assert_close(f"{name}-cut", one)


@pytest.mark.parametrize("name", PRACTICE)
def test_practice_on_two_processes_resumes_exactly(two_ranks, name):
    rows = metrics(Path(f"runs/2-{name}"))
    assert len(rows) == 1 + 6 and rows == metrics(Path(f"runs/2-{name}-cut"))
    assert not changed(weights(f"2-{name}"), weights(f"2-{name}-cut"))
    assert not changed(weights(name, "reward"), weights(f"2-{name}", "reward"))
    assert changed(weights(name), weights(f"2-{name}"))
    assert int(rows[-1][2]) % 4 == 0 and int(rows[-1][1]) >= 6 * 16


@pytest.mark.parametrize("name", PRACTICE)
def test_practice_goes_on_with_fewer_processes(two_ranks, name):
    run("stage2", **TWO, stage1=f"runs/{name}", out=f"runs/2-{name}-cut-cut", resume=True)
    rows = metrics(Path(f"runs/2-{name}-cut-cut"))
    assert len(rows) == 1 + 6 and rows[:6] == metrics(Path(f"runs/2-{name}"))[:6]


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        ("--num-envs 5", "--num-envs 5: cannot be shared evenly by 2"),
        ("--batch 5", "--batch 5"),
        ("--operator", "--operator"),
    ],
)
def test_what_two_processes_cannot_share(here, monkeypatch, capsys, args, culprit):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(SystemExit):
        call(stage2, [*args.split(), "--stage1", "runs/full1", "--out", "runs/wrong"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and culprit in error and not Path("runs/wrong").exists()


def test_a_script_for_one_process_refuses_torchrun(monkeypatch, capsys):
    for name in ranks.TORCHRUN:
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)
    for local, lines in (("0", 1), ("1", 0)):  # of two processes one speaks
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as end:
            call(evaluation, [])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == lines and ("torchrun" in error) == bool(lines)


def test_shares_are_every_row_once(monkeypatch):
    x = np.arange(7.0)
    for n in (1, 2, 3, 9):
        monkeypatch.setattr(ranks, "world", lambda n=n: n)
        parts = []
        for r in range(n):
            monkeypatch.setattr(ranks, "rank", lambda r=r: r)
            parts.append(ranks.local_rows(x))
        assert sorted(v for part, weight in parts if weight for v in part) == x.tolist()
        assert np.isclose(np.mean([weight * part.mean() for part, weight in parts]), x.mean())


# --- memory and speed -------------------------------------------------------------------------------------
def traced(monkeypatch) -> list:
    """The graphs that torch.compile will be given; run as they are: to compile them takes a minute."""
    graphs = []
    torch._dynamo.reset()
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_checkpointed_and_compiled_blocks_compute_the_same(monkeypatch):
    graphs = traced(monkeypatch)
    model, economical = small(), small()
    files.economise(economical, checkpointing=True, compiled=True)
    for a, b in zip(answers(economical), answers(model), strict=True):
        torch.testing.assert_close(a, b)
    assert 3 <= len(graphs) <= 10  # blocks share their compilation
    theirs = gradients(model)
    for name, g in gradients(economical).items():
        torch.testing.assert_close(g, theirs[name])
    assert economical.state_dict().keys() == model.state_dict().keys()


def test_checkpointing_keeps_less(monkeypatch):
    def kept(model: EFM) -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t):
            obs, goals = see()
            model.log_prob(obs, goals, torch.tensor([[3, 4]] * 3), RANGES)
        return sum(sizes.values())

    model = small(depth=8)
    before = kept(model)
    files.economise(model, checkpointing=True, compiled=False)
    assert kept(model) < before / 2


def test_bfloat16_blurs_neither_d_nor_states():
    model = small()
    exact = answers(model)
    with ranks.autocast(True):
        blurred = answers(model)
        assert model.language_model.layers[0].q_proj(torch.zeros(1, 16)).dtype == torch.bfloat16
    assert 0 < (blurred[0] - exact[0]).abs().max() < 0.05
    assert blurred[1].dtype == torch.float32 and len(set(blurred[1].tolist())) == 3  # bfloat16 has no numbers between 69 and 69.5
    assert (blurred[1] - exact[1]).abs().max() < 0.2
    with ranks.autocast(False):
        assert all(torch.equal(a, b) for a, b in zip(answers(model), exact, strict=True))


def test_the_flags_reach_both_stages(here, monkeypatch, tmp_path):
    compiled, rerun, original = [], [], files.checkpoint
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    monkeypatch.setattr(
        files,
        "checkpoint",
        lambda *a, **k: rerun.append(torch.is_autocast_enabled("cpu")) or original(*a, **k),
    )
    flags = {"bf16": True, "checkpointing": True, "compile": True}
    for stage, count, more in (
        ("stage1", 1, STATES),
        ("stage2", 3, TWO | {"stage1": str(tmp_path / "stage1")}),
    ):
        run(stage, **more, **flags, out=str(tmp_path / stage))
        assert len(compiled) == count and rerun and all(rerun)
    assert np.isfinite(np.array([row[:12] for row in metrics(tmp_path / "stage2")[1:]], float)).all()
