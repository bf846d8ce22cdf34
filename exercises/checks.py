"""What checks the exercises, a function each: numbers by hand first, then the repository's own functions.

The text of an assertion is all that a student sees.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import envs
import model
import pointmass
import stage2
import tokens
from common import counting
from exercises import ex09_algorithm1 as bandit
from exercises import practice


def check(name: str, m) -> None:
    """Raises NotImplementedError where there is still something to do, AssertionError where it is wrong."""
    if name in WHY:
        prediction(name, m)
    else:
        globals()[name](m)


def equal(got: Tensor, want: Tensor | list, lesson: str) -> None:
    """Same shape and, up to rounding, the same numbers; else what came and what should have."""
    want = torch.as_tensor(want)
    assert isinstance(got, Tensor), f"returns {type(got).__name__}, not a Tensor"
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}. {lesson}"
    floating = want.is_floating_point()
    assert got.is_floating_point() == floating, f"{got.dtype}, where {want.dtype} is due. {lesson}"
    off = (got.detach().double() - want.double()).abs()
    if (off <= 1e-4 * (1 + want.double().abs())).all():
        return
    if want.numel() > 25:
        raise AssertionError(f"off by up to {off.max():.3g}. {lesson}")
    came, due = (x.detach().numpy() if floating else x.long().numpy() for x in (got, want))
    raise AssertionError(f"{lesson}.\nYours:\n{came}\nshould be\n{due}")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ex01_labels(m) -> None:
    lesson = "3 observations have 2 steps between them; the last one has 0 to go"
    equal(m.steps_to_go(torch.tensor([3, 1, 4])), [2, 1, 0, 0, 3, 2, 1, 0], lesson)
    data = pointmass.demonstrate(50, seeded())
    lengths = torch.bincount(data["episode"])
    equal(m.steps_to_go(lengths[lengths > 0]), data["steps_to_go"], "pointmass.py's own labels differ")


def ex02_bins(m) -> None:
    got = m.encode(torch.tensor([0, 1, 2, 3, 8, 9, 10, 99]), 10, 5)
    lesson = "10 steps in 5 bins are 2 a bin: 0 and 1 are bin 0; the last takes the rest"
    equal(got, [0, 0, 1, 1, 4, 4, 4, 4], lesson)
    got = m.expected(torch.eye(50)[:1], 140, 50)
    equal(got, [0.0], "sure of bin 0: with its centre, 1.4, d never gets below, and s = 1 never fires")
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    equal(m.expected(p, 8, 4), [1.5, 6.0], "0.5 · 0 + 0.25 · 2 + 0.25 · 4: two steps a bin, from 0 2 4 6 on")
    steps = torch.arange(400)
    for cap, bins in ((140, 50), (100, 50), (300, 300), (7, 4)):
        own = tokens.StepsToGo(cap, bins)
        lesson = f"tokens.StepsToGo(cap={cap}, bins={bins}) differs: a bin is {cap / bins} steps wide"
        equal(m.encode(steps, cap, bins), own.encode(steps)[:, 0], lesson)
        p = torch.rand(5, bins, generator=seeded()).softmax(1)
        equal(m.expected(p, cap, bins), p @ own.edges, lesson)


def ex03_numbers(m) -> None:
    got = m.encode(torch.tensor([[0.030, -0.015], [0.0, 0.0061]]), 0.03)
    equal(got, [[11, 10, 12, 5], [11, 0, 11, 2]], "sign, magnitude, sign, magnitude: 11 is +, 12 is -")
    got = m.encode(torch.tensor([[-0.0014, 0.0016]]), 0.03)
    equal(got, [[11, 0, 11, 1]], "to the nearest of 0, 3, 6 ... mm; what rounds to zero is +0")
    got = m.encode(torch.tensor([[0.09, -1.0]]), 0.03)
    equal(got, [[11, 10, 12, 10]], "beyond the limit is the limit: a magnitude of 11 would be a sign")
    equal(m.decode(torch.tensor([[11, 10, 12, 5]]), 0.03), [[0.03, -0.015]], "decode is the way back")
    action = (torch.rand(10_000, 2, generator=seeded()) * 2 - 1) * 0.03
    own = tokens.SignMagnitude(0.03, 2)
    equal(m.encode(action, 0.03), own.encode(action), "tokens.SignMagnitude.encode differs")
    back = m.decode(m.encode(action, 0.03), 0.03)
    worst = 1000 * (back - action).abs().max().item()
    assert worst < 1.5001, f"10,000 actions come back up to {worst:.2f} mm off: half a step is 1.5 mm"


def ex04_returns(m) -> None:
    d = torch.tensor([[10.0, 8.0, 9.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    lesson = "Eq. 2: closer is positive, from 10 to 8 steps to go is +2; the last step counts, too"
    equal(m.rewards(d), [[2.0, -1.0, 7.0], [0.0, 0.0, 0.0]], lesson)
    reward = torch.tensor([[2.0, -1.0, 8.0]])
    lesson = "from behind: 8, then -1 + 0.5 · 8 = 3, then 2 + 0.5 · 3"
    equal(m.monte_carlo_returns(reward, 0.5), [[3.5, 3.0, 8.0]], lesson)
    unchanged = reward.tolist() == [[2, -1, 8]]
    assert unchanged, "`reward` has changed: clone it first, the caller may still need it"
    equal(m.monte_carlo_returns(reward, 0.0), reward, "at γ = 0 only the next reward counts")
    d = 50 * torch.rand(6, 20, generator=seeded())
    equal(m.rewards(d), stage2.rewards(d), "stage2.rewards differs")
    for gamma in (0.0, 0.9, 1.0):
        own = stage2.monte_carlo_returns(stage2.rewards(d), gamma)
        got = m.monte_carlo_returns(m.rewards(d), gamma)
        equal(got, own, f"stage2.monte_carlo_returns differs at γ = {gamma}")
    equal(got, d[:, :-1] - d[:, -1:], "at γ = 1 the sum telescopes to d(o_t) - d(o_T+1)")


def ex05_reinforce(m) -> None:
    log_prob = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = m.reinforce_loss(log_prob, torch.tensor([3.0, 0.0, -1.5]), 0.2)
    equal(loss, -0.2, "-0.2 · (3 · -1 + 0 · -2 - 1.5 · -4) / 3")
    loss.backward()
    lesson = "descent must raise log p where R > 0, and lower it where R < 0"
    equal(log_prob.grad, [-0.2, 0.0, 0.1], lesson)
    policy = bandit.Policy()
    policy.scores.data = torch.randn(9, generator=seeded())
    p = policy.scores.softmax(0)
    exact = torch.autograd.grad(-0.05 * (p * bandit.VALUE).sum(), policy.scores)[0]
    expected = torch.zeros(9)
    for a in range(9):  # each answer's gradient, as often as it is sampled
        log_p = policy.log_prob(torch.zeros(1), torch.tensor([a]))
        loss = m.reinforce_loss(log_p, bandit.VALUE[a : a + 1], 0.05)
        expected += p[a].detach() * torch.autograd.grad(loss, policy.scores)[0]
    off = (expected - exact).abs().max() / exact.abs().max()
    assert off < 1e-3, "the expected gradient is not that of the expected return: log p, and R as it is"

    def update(policy, optimizer, rng) -> None:
        obs, answer, d = bandit.collect(policy, rng)
        optimizer.zero_grad()
        m.reinforce_loss(policy.log_prob(obs, answer), stage2.rewards(d)[:, 0], bandit.C).backward()
        optimizer.step()

    value = practised(update, 60)
    assert value > 3, f"after 60 updates the value is {value:.2f}, not above 3"


def practised(iteration, times: int) -> float:
    """The policy's value on the bandit, at first 0.5, after so many iterations."""
    policy, rng = bandit.Policy(), seeded()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(times):
        iteration(policy, optimizer, rng)
    return (policy.scores.softmax(0) * bandit.VALUE).sum().item()


def ex06_appendix_e(m) -> None:
    lesson = "V = -3, -2, -4 and γ = 0.5: rewards are 1, -2, so R is 0, -2; the paper's formula gives 1, 0"
    equal(m.missing_term(torch.tensor([[-3.0, -2.0, -4.0]]), 0.5), [[-1.0, -2.0]], lesson)
    value = -20 * torch.rand(8, 13, generator=seeded())
    for gamma in (0.0, 0.5, 0.9, 1.0):
        returns = stage2.monte_carlo_returns(stage2.rewards(-value), gamma)
        ahead = stage2.monte_carlo_returns((1 - gamma) * value[:, 1:], gamma)
        got = ahead - value[:, :-1] + m.missing_term(value, gamma)
        equal(got, returns, f"the paper's R and your term are not R at γ = {gamma}")
    value[:, -1] = 0
    lesson = "an episode that ends in its goal lacks nothing: there V(o_T+1) = 0"
    equal(m.missing_term(value, 0.9), torch.zeros(8, 12), lesson)


def ex07_prefix_mask(m) -> None:
    drawn = torch.tensor([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    got = m.prefix_mask(torch.ones(1, 3, dtype=torch.bool), 2)
    assert got.dtype == torch.bool, f"{got.dtype}, not bool"
    equal(got, drawn[None, None], "the docstring's picture: the prefix sees all of itself, and no answer")
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    got = m.prefix_mask(valid, 1)
    hidden = not got[0, 0, 2:, :2].any()
    assert hidden, "padding is seen: a question would have another answer beside a longer one"
    assert got[0, 0].diagonal().all(), "padding does not see itself: of padding alone, softmax makes NaN"
    equal(got, model.prefix_mask(valid, 1), "model.prefix_mask differs")
    later, question, cache = behaviour(m.prefix_mask)
    assert later < 1e-5, "a later answer token changes an earlier one: it was read before it was said"
    assert question > 1e-3, "the question's first word does not change the answer"
    assert cache < 1e-4, "decoding with and without cache differ"


def behaviour(mask) -> list[float]:
    """What changes by how much in a tiny model: by a later answer token, by the question, by the cache."""
    torch.manual_seed(0)
    sizes = model.EFMConfig(width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=16)
    efm = model.EFM(sizes, tokens.Tokenizer.train(["red goal", "blue goal"]))
    ranges = [(0, 8)] * 3
    with mock.patch.object(model, "prefix_mask", mask), torch.no_grad():
        plain = efm.log_probs({}, ["red goal"], torch.tensor([[1, 2, 3]]), ranges)
        later = efm.log_probs({}, ["red goal"], torch.tensor([[1, 7, 3]]), ranges)
        asked = efm.log_probs({}, ["blue goal"], torch.tensor([[1, 2, 3]]), ranges)
        answer, entropy = efm.sample({}, ["red goal"], ranges, greedy=True)  # with its cache
        log_p = torch.stack(efm.log_probs({}, ["red goal"], answer, ranges), 1)  # (1, 3, 8)
    uncached = -(log_p.exp() * log_p).sum(-1)
    pairs = [(plain[1], later[1]), (plain[0], asked[0]), (uncached, entropy)]
    return [(a - b).abs().max().item() for a, b in pairs]


def ex08_detector(m) -> None:
    detected = torch.tensor([1, 1, 1, 0, 0, 0, 0]).bool()
    truth = torch.tensor([1, 1, 0, 1, 1, 0, 0]).bool()
    want = {"true_positives": 2, "false_positives": 1, "false_negatives": 2, "true_negatives": 2}
    got = m.confusion(detected, truth)
    assert got == want, f"{got} should be {want}: positive is what the detector says"
    d = torch.tensor([[9.0, 2, 1, 0, 0], [9.0, 1, 5, 6, 7], [9.0, 8, 7, 6, 5], [9.0, 8, 0.5, 3, 3]])
    truth = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    for s, want, lesson in (
        (2.0, [True, False, True], "detected at times 1, 1, 2: true at 1-3, 1-3, 2-4? Not before"),
        (1.0, [True, False, True], "detected at times 2, 1, 2; the third episode has no detection, no entry"),
        (0.5, [True, True], "half a step is rounded up: detected at time 2, the last may be true at 3"),
        (3.0, [True, True, True], "with s = 3 all are right in time: the claim is weaker"),
    ):
        got = m.confirmed_within(d, truth, s)
        assert got == want, f"s = {s}: {got} should be {want}. {lesson}"
    d = 10 * torch.rand(200, 15, generator=seeded())
    truth = torch.rand(200, 15, generator=seeded(1)) < 0.1
    for s in (0.5, 1.0, 3.0):
        own = counting.confirmed_detections(d.numpy(), truth.numpy(), s)
        assert m.confirmed_within(d, truth, s) == own, f"counting.confirmed_detections differs at s = {s}"


def ex09_algorithm1(m) -> None:
    policy, rng = bandit.Policy(), seeded()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for owner, name in ((policy, "log_prob"), (optimizer, "zero_grad"), (optimizer, "step")):
        setattr(owner, name, mock.Mock(wraps=getattr(owner, name)))  # counts calls
    for _ in range(3):
        m.iteration(policy, optimizer, rng)
    updates = [call.args[0].tolist() for call in policy.log_prob.call_args_list]
    n, sizes = len(updates), {len(update) for update in updates}
    assert n == 3 * bandit.N, f"line 7: {n} updates in three iterations, not N = {bandit.N} each"
    assert sizes == {bandit.B}, f"line 7: updates of {sizes} tuples, not B = {bandit.B}"
    used = sum(updates, [])
    once = len(set(used)) == len(used)
    assert once, "a tuple was used twice: one pass (line 7), and an empty buffer behind it (line 8)"
    again = seeded()
    fresh = sum((bandit.collect(bandit.Policy(), again)[0].tolist() for _ in range(6)), [])
    first = used[: bandit.N * bandit.B]
    assert first != fresh[: len(first)], "line 7: the buffer was not shuffled"
    assert set(first) <= set(fresh), "line 2: collect until there are N · B tuples, and no more"
    assert optimizer.step.call_count == n, "line 7: one optimizer.step() an update"
    assert optimizer.zero_grad.call_count == n, "gradients add up: zero_grad() before each backward()"
    value = practised(m.iteration, 60 // bandit.N)
    assert value > 3, f"after 60 updates the value is {value:.2f}, not above 3: which way round is R?"


# --- predictions, against what results/exercises.py measured ------------------------------------------------
WHY = {  # what whoever is wrong is told
    "ex10_discount": "At γ = 1 a return has the noise of all that comes after; at 0.9, of about ten steps.",
    "ex11_final_observation": "Which bin does label 1 share with 0? What is the least d without a label 0?",
    "ex12_baseline": "-R log p has no bound where R < 0 and p goes to 0; half of the tuples now push there.",
    "ex13_raw_labels": "Near the goal, d and so each reward are only 2.8 times as large; further off, flat.",
    "ex14_moving_reward": "A detection teaches d that what it detected was near. Who corrects a wrong one?",
    "ex15_fresh_adam": "A fresh Adam moves a weight by about its learning rate, however small the loss is.",
    "ex16_flipped_sign": "Clipped updates make a policy worse bit by bit, and the best so far is kept.",
    "ex17_reward_to_go": "At γ = 0.9, R_1 is about the first ten steps, and it rewards all that follow.",
}


def prediction(name: str, m) -> None:
    """The word for each variant is the one that the measured means give."""
    given, measure = practice.predictions(m), getattr(m, "MEASURE", "mean_steps")
    words = ", ".join(practice.WORDS[measure])
    if "" in given.values():
        raise NotImplementedError(f"Write PREDICTION, one of {words}, before you run it.")
    table = practice.measured()
    for variant, word in given.items():
        assert word in practice.WORDS[measure], f"PREDICTION {word!r} for {variant}: choose one of {words}"
        came = practice.span(table[name, variant], measure, ".3g")
        plain = practice.span(table[practice.UNCHANGED], measure, ".3g")
        told = f"you predicted {word}; {measure} is {came} with {variant}, {plain} unchanged. {WHY[name]}"
        assert word == practice.outcome(name, variant), told


# --- tests, and a domain ------------------------------------------------------------------------------------
def passes(test: str) -> bool:
    """Whether a test of this repository does, run within this process."""
    how = ["-p", "no:cacheprovider", "-p", "no:terminal", "--rootdir", str(practice.ROOT)]
    return pytest.main([*how, str(practice.ROOT / test)]) == 0


def ex18_bug_hunt(m) -> None:
    for bug, test in m.TESTS.items():
        if test == "":
            raise NotImplementedError(f"{bug}: write the test that names it into TESTS.")
        assert passes(test), f"{bug}: {test} does not pass without the bug; is it tests/FILE.py::NAME?"
        owner, *path = bug.split(".")
        right = sys.modules[owner]
        for part in path:
            right = getattr(right, part)
        with pytest.MonkeyPatch.context() as patch:  # wherever it has been imported to
            patch.setattr(right, "__code__", getattr(m, path[-1]).__code__)
            found = not passes(test)
        assert found, f"{bug}: {test} passes with the bug, too; which input would show it?"


def ex19_domain(m) -> None:
    known = mock.patch.dict(sys.modules, dial_of_yours=m), mock.patch.dict(envs.DOMAINS)
    with known[0], known[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an id that is registered again
        envs.register("dial", "dial_of_yours:Dial")
        env = envs.make_vec("dial", 500)
        env.reset(seed=0)
        near = np.abs(env.left()) < 2 * m.NEAR
        assert not near.any(), f"{near.sum()} of 500 episodes begin nearer than 2 NEAR to their mark"
        asked = [m.MARKS[text.split()[-1]] for text in env.texts]
        assert set(asked) == set(m.MARKS.values()), "500 episodes do not ask for all marks"
        assert np.array_equal(asked, env.mark), "the text names another mark than self.mark"
        angle = torch.tensor(env.angle).deg2rad()
        state = torch.stack([angle.sin(), angle.cos()], 1)
        equal(torch.tensor(env._state()), state, "sine and cosine of the angle, float32")
        env.angle[:2], env.mark[:2] = (350.0, 10.0), (10.0, 350.0)
        lesson = "from 350 degrees it is 20 to 10, and -20 back: the dial wraps round"
        equal(torch.tensor(env.left()[:2]), [20.0, -20.0], lesson)
        best, shown = steps_of(env, "expert"), steps_of(env, "demonstrate")
        assert best <= 18, f"expert(): {best} steps to the last mark, where 18 times 10 degrees are enough"
        assert best < shown < env.horizon, (
            f"demonstrate() needs {shown} steps, expert() {best}, a time-out 60"
        )
        from tests.test_envs import contract

        try:
            contract("dial", modes=("state",))
        except AssertionError as broken:
            where = [frame.name for frame in traceback.extract_tb(broken.__traceback__)]
            raise AssertionError(f"tests/test_envs.py: {where[2]}: {broken}") from None


def steps_of(env: envs.Domain, who: str) -> int:
    """Steps until the last simulation has been at its mark, at most the horizon."""
    reached = env.reset(seed=0)[1]["is_success"]
    for step in range(env.horizon):
        if reached.all():
            return step
        reached = reached | env.step(getattr(env, who)())[-1]["is_success"]
    return env.horizon
