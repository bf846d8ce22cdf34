"""The exercises: every stub is unsolved, every solution passes, every typical mistake fails; what is published of them."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
import pointmass
import stage2
import tokens
from common import UserError, counting
from envs import SingleView
from exercises import checks, ex16_flipped_sign, ex19_domain, practice, release
from exercises import ex09_algorithm1 as bandit
from exercises.ex19_domain import MARKS, NEAR
from exercises.test_yours import NAMES
from results import exercises as measure

ROOT = Path(__file__).resolve().parents[1]
returns_of, loss_of = stage2.monte_carlo_returns, stage2.reinforce_loss


# --- solutions ------------------------------------------------------------------------------------------------------------
def labels(lengths):
    return torch.cat([torch.arange(n - 1, -1, -1) for n in lengths.tolist()])


def number_tokens(action, limit):
    return tokens.SignMagnitude(limit, action.shape[1]).encode(action)


def numbers(ids, limit):
    return tokens.SignMagnitude(limit, ids.shape[1] // 2).decode(ids)


def missing(value, gamma):
    T = value.shape[1] - 1
    return gamma ** torch.arange(T, 0, -1.0) * value[:, -1:]


def counts(detected, truth):
    table = counting.confusion(detected.numpy(), truth.numpy())
    return {k: v for k, v in table.items() if k not in ("precision", "recall")}


def confirmed(d, truth, s):
    return counting.confirmed_detections(d.numpy(), truth.numpy(), s)


def algorithm1(policy, optimizer, rng, *, forget=True, shuffle=True, clear=True, replace=False, sign=1, kept=None):
    buffer = [] if forget else kept
    while sum(len(obs) for obs, _, _ in buffer) < bandit.N * bandit.B:
        obs, answer, d = bandit.collect(policy, rng)
        returns = returns_of(sign * stage2.rewards(d), bandit.GAMMA)[:, 0]
        buffer.append((obs, answer, returns))
    obs, answer, returns = (torch.cat(x) for x in zip(*buffer, strict=True))
    order = torch.randperm(len(obs), generator=rng) if shuffle else torch.arange(len(obs))
    order = torch.randint(len(obs), (len(obs),), generator=rng) if replace else order
    for i in order[: bandit.N * bandit.B].split(bandit.B):
        loss = loss_of(policy.log_prob(obs[i], answer[i]), returns[i], bandit.C)
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()


SOLUTIONS = {
    "ex01_labels": {"steps_to_go": labels},
    "ex02_bins": {
        "encode": lambda steps, cap, bins: tokens.StepsToGo(cap, bins).encode(steps)[:, 0],
        "expected": lambda p, cap, bins: p @ tokens.StepsToGo(cap, bins).edges,
    },
    "ex03_numbers": {"encode": number_tokens, "decode": numbers},
    "ex04_returns": {"rewards": stage2.rewards, "monte_carlo_returns": returns_of},
    "ex05_reinforce": {"reinforce_loss": loss_of},
    "ex06_appendix_e": {"missing_term": missing},
    "ex07_prefix_mask": {"prefix_mask": model.prefix_mask},
    "ex08_detector": {"confusion": counts, "confirmed_within": confirmed},
    "ex09_algorithm1": {"iteration": algorithm1},
}


class Dial(ex19_domain.DialVectorEnv):
    def left(self):
        return (self.mark - self.angle + 180) % 360 - 180

    def _place(self, rows):
        names = list(MARKS)
        for i in rows:
            word = names[self.rngs[i].integers(len(names))]
            self.mark[i], self.texts[i] = MARKS[word], f"turn the dial {word}"
            self.angle[i] = (self.mark[i] + self.rngs[i].uniform(2 * NEAR, 360 - 2 * NEAR)) % 360

    def _move(self, actions):
        self.angle = (self.angle + actions[:, 0]) % 360

    def _state(self):
        angle = np.radians(self.angle)
        return np.stack([np.sin(angle), np.cos(angle)], 1).astype(np.float32)

    def _success(self):
        return np.abs(self.left()) < NEAR

    def expert(self):
        return np.clip(self.left(), self.low, self.high)[:, None]

    def demonstrate(self):
        return self.expert() / 2


class DialAlone(SingleView):
    vector_class = Dial


TESTS = {
    "stage2.monte_carlo_returns": "tests/test_stage2.py::test_monte_carlo_returns",
    "tokens.StepsToGo.encode": "tests/test_tokens.py::test_steps_to_go_labels",
    "model.prefix_mask": "tests/test_model.py::test_prefix_mask_is_the_one_drawn_in_the_docstring",
    "model.EFM.log_prob": "tests/test_model.py::test_log_prob_sums_to_one_over_all_answers",
    "common.counting.confirmed_detections": "tests/test_rollout.py::test_success_before_the_detection_alone_does_not_count",
}
SOLUTIONS |= {
    "ex18_bug_hunt": {"TESTS": TESTS},
    "ex19_domain": {"DialVectorEnv": Dial, "DialEnv": DialAlone},
}


def solution(name: str) -> dict:
    """Of a negative exercise it is what was measured."""
    if name in SOLUTIONS:
        return SOLUTIONS[name]
    return {"PREDICTION": {variant: practice.outcome(name, variant) for variant in practice.load(name).VARIANTS}}


# --- mistakes -------------------------------------------------------------------------------------------------------------
def no_minus_zero_forgotten(action, limit):
    sign = torch.where(action < 0, 12, 11)
    return torch.stack([sign, number_tokens(action, limit)[:, 1::2]], -1).flatten(1)


def truncated(action, limit):
    magnitude = (action.abs() / limit * 10).clamp(max=10).long()
    return torch.stack([torch.where((action < 0) & (magnitude > 0), 12, 11), magnitude], -1).flatten(1)


def unclamped(action, limit):
    magnitude = (action.abs() / limit * 10).round().long()
    return torch.stack([torch.where((action < 0) & (magnitude > 0), 12, 11), magnitude], -1).flatten(1)


def grouped(action, limit):
    ids = number_tokens(action, limit)
    return torch.cat([ids[:, ::2], ids[:, 1::2]], 1)


def in_place(reward, gamma):
    for t in reversed(range(reward.shape[1] - 1)):
        reward[:, t] += gamma * reward[:, t + 1]
    return reward


def undiscounted(reward, gamma):
    return returns_of(reward, 1.0)


def past_rewards(reward, gamma):
    return returns_of(reward.flip(1), gamma).flip(1)


def whole_episode(reward, gamma):
    return returns_of(reward, gamma)[:, :1].expand_as(reward)


def causal(valid, answers):
    T = valid.shape[1] + answers
    keys = torch.cat([valid, valid.new_ones(len(valid), answers)], 1)
    return (torch.ones(T, T, dtype=torch.bool).tril() & keys[:, None] | torch.eye(T, dtype=torch.bool))[:, None]


def everything(valid, answers):
    T = valid.shape[1] + answers
    keys = torch.cat([valid, valid.new_ones(len(valid), answers)], 1)
    return (keys[:, None].expand(-1, T, -1) | torch.eye(T, dtype=torch.bool))[:, None]


def padding_seen(valid, answers):
    return model.prefix_mask(torch.ones_like(valid), answers)


def blind_padding(valid, answers):
    keys = torch.cat([valid, valid.new_ones(len(valid), answers)], 1)
    return model.prefix_mask(valid, answers) & keys[:, None, None]


def swapped(detected, truth):
    table = counts(detected, truth)
    table["false_positives"], table["false_negatives"] = table["false_negatives"], table["false_positives"]
    return table


def at_once(d, truth, s):
    return [bool(truth[i][d[i] <= s][0]) for i in range(len(d)) if (d[i] <= s).any()]


def whenever(d, truth, s):
    return [bool(truth[i].any()) for i in range(len(d)) if (d[i] <= s).any()]


def every_episode(d, truth, s):
    found = iter(confirmed(d, truth, s))
    return [next(found) if (row <= s).any() else False for row in d]


def rounded_down(d, truth, s):
    first = [(row, int((row <= s).float().argmax())) for row in d]
    return [bool(t[i : i + int(s) + 1].any()) for (row, i), t in zip(first, truth, strict=True) if (row <= s).any()]


def one_large_update(policy, optimizer, rng):
    for _ in range(bandit.N):
        obs, answer, d = bandit.collect(policy, rng)
        loss = loss_of(policy.log_prob(obs, answer), stage2.rewards(d)[:, 0], bandit.C)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def dial(**methods):
    """The dial with a mistake, and its single view."""
    wrong = type("wrong", (Dial,), methods)
    sys.modules[__name__].wrong = wrong  # for pickle
    return {"DialVectorEnv": wrong, "DialEnv": type("DialEnv", (SingleView,), {"vector_class": wrong})}


def of_one_generator(self, rows):
    self.rngs, own = [self.rngs[0]] * self.num_envs, self.rngs
    Dial._place(self, rows)
    self.rngs = own


def anywhere(self, rows):
    Dial._place(self, rows)
    for i in rows:
        self.angle[i] = self.rngs[i].uniform(0, 360)


def shared(self):
    self.kept = getattr(self, "kept", np.zeros((self.num_envs, 2), np.float32))
    self.kept[:] = Dial._state(self)
    return self.kept


KEPT: list = []  # a buffer that nobody empties
WRONG = {
    "ex01_labels": {
        "the final observation forgotten": {"steps_to_go": lambda n: labels(n - 1)},
        "1 at the goal": {"steps_to_go": lambda n: labels(n) + 1},
        "counted up": {"steps_to_go": lambda n: torch.cat([torch.arange(i) for i in n.tolist()])},
        "one episode": {"steps_to_go": lambda n: torch.arange(int(n.sum()) - 1, -1, -1)},
    },
    "ex02_bins": {
        "centres": {"expected": lambda p, cap, bins: p @ ((torch.arange(bins) + 0.5) * cap / bins)},
        "tokens, not steps": {"expected": lambda p, cap, bins: p @ torch.arange(float(bins))},
        "the most probable": {"expected": lambda p, cap, bins: p.argmax(1) * cap / bins},
        "rounded": {"encode": lambda s, cap, bins: (s * bins / cap).round().long().clamp(max=bins - 1)},
        "not clamped": {"encode": lambda s, cap, bins: s * bins // cap},
        "a whole width": {"encode": lambda s, cap, bins: (s // (cap // bins)).clamp(max=bins - 1)},
    },
    "ex03_numbers": {
        "minus zero": {"encode": no_minus_zero_forgotten},
        "truncated": {"encode": truncated},
        "not clamped": {"encode": unclamped},
        "signs first": {"encode": grouped},
        "the sign lost": {"decode": lambda ids, limit: numbers(ids, limit).abs()},
        "no limit": {"decode": lambda ids, limit: numbers(ids, 1.0)},
    },
    "ex04_returns": {
        "swapped sign": {"rewards": lambda d: d[:, 1:] - d[:, :-1]},
        "no last step": {"rewards": lambda d: d[:, :-2] - d[:, 1:-1]},
        "no discount": {"monte_carlo_returns": undiscounted},
        "in place": {"monte_carlo_returns": in_place},
        "the past": {"monte_carlo_returns": past_rewards},
        "one for the episode": {"monte_carlo_returns": whole_episode},
    },
    "ex05_reinforce": {
        "swapped sign": {"reinforce_loss": lambda log_p, R, c: c * (R * log_p).mean()},
        "p, not log p": {"reinforce_loss": lambda log_p, R, c: -c * (R * log_p.exp()).mean()},
        "summed": {"reinforce_loss": lambda log_p, R, c: -c * (R * log_p).sum()},
        "no c": {"reinforce_loss": lambda log_p, R, c: -(R * log_p).mean()},
        "no negative returns": {"reinforce_loss": lambda log_p, R, c: -c * (R.clamp(min=0) * log_p).mean()},
    },
    "ex06_appendix_e": {
        "nothing": {"missing_term": lambda V, gamma: torch.zeros_like(V[:, 1:])},
        "off by one": {"missing_term": lambda V, gamma: missing(V, gamma) / max(gamma, 1e-9)},
        "not discounted": {"missing_term": lambda V, gamma: gamma * V[:, -1:].expand_as(V[:, 1:])},
        "swapped sign": {"missing_term": lambda V, gamma: -missing(V, gamma)},
        "forwards": {"missing_term": lambda V, gamma: missing(V, gamma).flip(1)},
    },
    "ex07_prefix_mask": {
        "causal": {"prefix_mask": causal},
        "the answer foreseen": {"prefix_mask": everything},
        "padding seen": {"prefix_mask": padding_seen},
        "NaN": {"prefix_mask": blind_padding},
        "no heads": {"prefix_mask": lambda valid, L: model.prefix_mask(valid, L)[:, 0]},
    },
    "ex08_detector": {
        "swapped": {"confusion": swapped},
        "shares": {"confusion": lambda d, t: {k: v / len(d) for k, v in counts(d, t).items()}},
        "at once": {"confirmed_within": at_once},
        "whenever": {"confirmed_within": whenever},
        "every episode": {"confirmed_within": every_episode},
        "rounded down": {"confirmed_within": rounded_down},
    },
    "ex09_algorithm1": {
        "the buffer kept": {"iteration": lambda *args: algorithm1(*args, forget=False, kept=KEPT)},
        "with replacement": {"iteration": lambda *args: algorithm1(*args, replace=True)},
        "not shuffled": {"iteration": lambda *args: algorithm1(*args, shuffle=False)},
        "gradients add up": {"iteration": lambda *args: algorithm1(*args, clear=False)},
        "swapped sign": {"iteration": lambda *args: algorithm1(*args, sign=-1)},
        "a rollout, an update": {"iteration": one_large_update},
    },
    "ex18_bug_hunt": {
        "another test": {"TESTS": TESTS | {"stage2.monte_carlo_returns": "tests/test_stage2.py::test_returns"}},
        "it passes": {"TESTS": TESTS | {"tokens.StepsToGo.encode": "tests/test_stage2.py::test_rewards"}},
    },
    "ex19_domain": {
        "the long way": dial(left=lambda self: self.mark - self.angle),
        "one generator for all": dial(_place=of_one_generator),
        "a start at the mark": dial(_place=anywhere),
        "an observation that changes later": dial(_state=shared),
        "as fast as the expert": dial(demonstrate=Dial.expert),
    },
}
for negative in practice.NAMES:  # every other word, for each variant
    shifts = [f"{variant}: word {i} off" for variant in practice.load(negative).VARIANTS for i in (1, 2)]
    WRONG[negative] = dict.fromkeys([*shifts, "no such word"])


def mistaken(name: str, mistake: str) -> dict:
    if name not in practice.NAMES:
        return WRONG[name][mistake]
    words = solution(name)["PREDICTION"]
    if mistake == "no such word":
        return {"PREDICTION": dict.fromkeys(words, "slower")}
    variant, shift = mistake.split(": word ")
    choices = practice.WORDS[getattr(practice.load(name), "MEASURE", "mean_steps")]
    other = choices[(choices.index(words[variant]) + int(shift[0])) % 3]
    return {"PREDICTION": words | {variant: other}}


# --- the tests ------------------------------------------------------------------------------------------------------------
def check(name: str, **changes) -> None:
    module = importlib.import_module(f"exercises.{name}")
    checks.check(name, SimpleNamespace(**{**vars(module), **changes}))


def test_every_exercise_has_a_check_a_solution_and_two_mistakes():
    assert len(NAMES) >= 17
    positive = {name for name in vars(checks) if name.startswith(("ex0", "ex1"))}
    assert positive == set(SOLUTIONS) and positive | set(checks.WHY) == set(NAMES) == set(WRONG)
    assert set(checks.WHY) == set(practice.NAMES)
    assert all(len(mistakes) >= 2 for mistakes in WRONG.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_unsolved(name):
    with pytest.raises(NotImplementedError):
        check(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    check(name, **solution(name))


@pytest.mark.parametrize(("name", "mistake"), [(name, mistake) for name in NAMES for mistake in WRONG[name]])
def test_the_mistake_fails_with_a_lesson(name, mistake):
    KEPT.clear()
    with pytest.raises(AssertionError) as lesson:
        check(name, **{**solution(name), **mistaken(name, mistake)})
    assert len(str(lesson.value)) > 25


# --- the runs of the negative ones ----------------------------------------------------------------------------
SMALL = {"episodes": 200, "stage1_updates": 20, "stage2_steps": 4096}  # one iteration of Stage 2 ...
SMALL |= {"Agent.load_state_dict": ex16_flipped_sign.keep_the_last}  # ... that counts


evaluate = pointmass.evaluate


def fingerprint(agent, rng):
    """pointmass.evaluate with the policy's weights, in which the least change shows, as `mean_steps`."""
    told = evaluate(agent, rng)
    assert 0 <= told["success"] <= 1 and 0 < told["mean_steps"] <= 12
    return told | {"mean_steps": sum(p.double().abs().sum().item() for p in agent.policy.parameters())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of everything at a size of seconds: what changes, in, and its row, out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointmass, "HORIZON", 12)
        patch.chdir(tmp_path_factory.mktemp("runs"))
        patch.setattr(pointmass, "evaluate", fingerprint)
        yield lambda changes: practice.run(SMALL | changes, 0)


def test_every_variant_runs_and_is_not_the_unchanged_run(tiny):
    rows = {key: tiny(changes) for key, changes in practice.every_run().items()}
    assert len(rows) >= 1 + len(practice.NAMES) == 9
    different = {row["mean_steps"] for row in rows.values()}
    assert len(different) == len(rows) - 1  # in ex16 both variants practise the same way
    trained = list(Path("runs/exercises").glob("*.pt"))
    assert len(trained) == 4  # unchanged, 50 and 140 bins without the final observations, labels as classes


def test_a_stage_1_from_the_cache_goes_on_as_the_trained_one(tiny):
    changes = {"gamma": 0.5}
    first, again = tiny(changes), tiny(changes)
    assert first | {"seconds": 0} == again | {"seconds": 0}
    cfg = pointmass.Config(**{k: v for k, v in SMALL.items() if not callable(v)}, gamma=0.5)
    rng = torch.manual_seed(0)  # as pointmass.main
    data = pointmass.demonstrate(cfg.episodes, rng)
    agent = pointmass.Agent(data, cfg.bins)
    optimizer = pointmass.stage1(agent, data, cfg, rng)
    pointmass.evaluate(agent, rng)
    with practice.patched(SMALL):
        pointmass.stage2(agent, optimizer, pointmass.calibrate(agent, data), cfg, rng)
    assert pointmass.evaluate(agent, rng)["mean_steps"] == first["mean_steps"]


def test_patches_end(tiny):
    before = dict(vars(pointmass)), dict(vars(pointmass.Agent))
    for changes in practice.every_run().values():
        with practice.patched(changes):
            pass
    assert before == (dict(vars(pointmass)), dict(vars(pointmass.Agent)))


def test_a_run_wants_a_prediction_first(tmp_path):
    with pytest.raises(UserError, match="ex12_baseline.py: write your PREDICTION"):
        practice.main("ex12")
    command = [sys.executable, ROOT / "exercises" / "practice.py", "ex99"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "exercise ex99: choose one of " + ", ".join(f"ex{n}" for n in range(10, 18)) + "\n"
    )


def test_a_run_shows_the_unchanged_and_the_changed_row(monkeypatch, capsys):
    monkeypatch.setattr(practice.load("ex11_final_observation"), "PREDICTION", {"50 bins": "more", "140 bins": "more"})
    monkeypatch.setattr(practice, "run", lambda changes, seed: {"mean_steps": 10.0 * len(changes), "seconds": seed})
    practice.main("ex11", 7)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["unchanged", "50", "140", "Published:"]
    assert "mean_steps 0 " in told[0] and "mean_steps 30 " in told[1] and "seconds 7" in told[2]


def test_what_is_measured_goes_on_where_it_was_interrupted(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(practice, "run", lambda changes, seed: ran.append(seed) or dict.fromkeys(measure.COLUMNS[3:], 0.5))
    out = tmp_path / "exercises.csv"
    measure.main(measure.Args(seeds=1, out=out))
    measure.main(measure.Args(seeds=2, out=out))
    n = len(practice.every_run())
    assert ran == [0] * n + [1] * n
    monkeypatch.setattr(practice, "CSV", out)
    table = practice.measured()
    assert set(table) == set(practice.every_run()) and {len(rows) for rows in table.values()} == {2}
    assert len(practice.readme_table()) == 2 + n


# --- what is published ----------------------------------------------------------------------------------------
def test_every_exercise_has_its_row_and_minutes():
    text = (ROOT / "exercises" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[\d+\]\((\w+)\.py\)[^|]*\| (\d+) \|", text, re.M))
    assert set(rows) == set(NAMES)
    for name, minutes in rows.items():
        docstring = importlib.import_module(f"exercises.{name}").__doc__
        assert f" {minutes} minutes" in docstring.splitlines()[0], name
        assert f"pytest exercises -k {name[:4]}" in docstring


def test_the_readmes_numbers_are_the_measured_ones():
    table = practice.measured()
    assert set(table) == set(practice.every_run())
    assert all(len(rows) >= 3 for rows in table.values())  # seeds
    text = (ROOT / "exercises" / "README.md").read_text()
    assert text.split("<!-- measured -->\n")[1].split("<!-- end -->")[0].splitlines() == practice.readme_table()


def test_an_afternoon_is_ten_minutes_of_computing():
    table = practice.measured()
    afternoon = [key for key in table if key[0] in ("unchanged", "ex10_discount", "ex12_baseline")]
    assert len(afternoon) == 3
    assert sum(practice.mean(table[key], "seconds") for key in afternoon) < 600


def test_the_teachers_plans_leave_the_time_that_the_exercises_need():
    text = (ROOT / "exercises" / "README.md").read_text()
    minutes = {n: int(m) for n, m in re.findall(r"^\| \[(\d+)\]\(\w+\.py\)[^|]*\| (\d+) \|", text, re.M)}
    page = (ROOT / "docs" / "teaching.md").read_text()
    for plan, total in (("## Two hours", 120), ("## One lab", 180)):
        rows = re.findall(r"^\| (\d+) \| (.*?) \| ([\d, ]*)\|", page.split(plan)[1].split("\n## ")[0], re.M)
        assert sum(int(given) for given, _, _ in rows) == total and len(rows) >= 4
        for given, what, exercises in rows:
            needed = sorted(minutes[n] for n in re.findall(r"\d+", exercises))
            needed = needed[-2:] if "takes two" in what else needed[-1:] if ", or " in what else needed
            assert int(given) >= sum(needed), f"{what}: {needed}"


FAILS = {
    "test_tokens::test_sign_magnitude_round_trips",
    "test_tokens::test_sign_magnitude_quantises_clamps_and_has_no_minus_zero",
    "test_tokens::test_steps_to_go_labels",
    "test_tokens::test_action_tokenizer_builds_what_the_domains_ask_for",
    "test_rollout::test_confusion",
    "test_rollout::test_confusion_without_a_class",
    "test_rollout::test_confirmed_detections",
    "test_rollout::test_success_before_the_detection_alone_does_not_count",
}


# --- the copy for a graded class ------------------------------------------------------------------------------
def graded(out: Path, *tests: str) -> dict[str, str]:
    """Tests of a copy: the text of what went wrong, "" where nothing did, by file::name."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "report.xml", *tests]
    subprocess.run(command, cwd=out, capture_output=True)
    told = {}
    for case in xml.etree.ElementTree.parse(out / "report.xml").iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        name = f"{case.get('classname').split('.')[-1]}::{case.get('name').split('[')[0]}"
        told[name] = told.get(name, "") + ("" if wrong is None else wrong.text)
    return told


FAST = "bins or sign_magnitude or labels or tokenizer or confusion or confirmed or detection or metrics"


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("graded") / "out"
    release.release(out)
    return out


def test_the_copy_lacks_the_functions_and_the_solutions(copied):
    stated = (ROOT / "docs" / "teaching.md").read_text()
    assert sum(map(len, release.FUNCTIONS.values())) == 14 and "bodies of fourteen functions" in stated
    assert not (copied / "tests" / "test_exercises.py").exists() and (copied / "tests" / "test_stage2.py").exists()
    for name, functions in release.FUNCTIONS.items():
        text = (copied / name).read_text()
        assert text.count("raise NotImplementedError") == len(functions)
        assert ast.get_docstring(ast.parse(text)) == ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert '    """r_t = d(o_t, g) - d(o_t+1, g)' in (copied / "stage2.py").read_text()


def test_what_fails_in_the_copy_is_what_was_taken_out(copied):
    told = graded(copied, "tests/test_tokens.py", "tests/test_rollout.py", "-k", FAST)
    failed = {name for name, text in told.items() if text}
    assert failed == FAILS
    assert all("NotImplementedError" in told[name] for name in failed)
    assert len(told) > len(failed) + 4


@pytest.mark.slow
def test_nothing_else_fails_in_the_whole_copy(copied):
    told = graded(copied)
    failed = {name for name, text in told.items() if text}
    assert failed >= FAILS and len(told) > 2 * len(failed)
    tagged = {"test_readme::test_the_tagged_line_computes_what_its_row_says"}  # there is no such line yet
    assert {name for name in failed if "NotImplementedError" not in told[name]} <= tagged
