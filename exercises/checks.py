"""What checks the exercises, a function each: numbers by hand first, then the repository's own functions.

Every assertion has a text, which is all that a student sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

import model
import pointmass
import rollout
import stage2
import tokens
from exercises import ex09_algorithm1 as bandit


def equal(got: Tensor, want: Tensor | list, lesson: str) -> None:
    """Same shape and, up to rounding, the same numbers; else what came and what should have."""
    want = torch.as_tensor(want)
    assert isinstance(got, Tensor), f"returns {type(got).__name__}, not a Tensor"
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}. {lesson}"
    kinds = [x.is_floating_point() for x in (got, want)]
    assert kinds[0] == kinds[1], f"{got.dtype}, where {want.dtype} is due. {lesson}"
    got, want = got.detach().double(), want.double()
    off = (got - want).abs()
    if (off <= 1e-4 * (1 + want.abs())).all():
        return
    if want.numel() > 25:
        raise AssertionError(f"off by up to {off.max():.3g}. {lesson}")
    came, due = ((x * 1e4).round().div(1e4).tolist() for x in (got, want))
    raise AssertionError(f"{came} should be {due}. {lesson}")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ex01_labels(m) -> None:
    got = m.steps_to_go(torch.tensor([3, 1, 4]))
    equal(got, [2, 1, 0, 0, 3, 2, 1, 0], "3 observations have 2 steps between them; the last one has 0 to go")
    data = pointmass.demonstrate(50, seeded())
    lengths = torch.bincount(data["episode"])
    equal(m.steps_to_go(lengths[lengths > 0]), data["steps_to_go"], "pointmass.py's recorded labels differ")


def ex02_bins(m) -> None:
    got = m.encode(torch.tensor([0, 1, 2, 3, 8, 9, 10, 99]), 10, 5)
    equal(got, [0, 0, 1, 1, 4, 4, 4, 4], "10 steps in 5 bins are 2 a bin: 0 and 1 are bin 0; the last takes the rest")
    goal = torch.zeros(1, 50)
    goal[0, 0] = 1
    lesson = "sure of bin 0, d is 0: with centres d >= 1.4 at 140 steps in 50 bins, and s = 1 would never fire"
    equal(m.expected(goal, 140, 50), [0.0], lesson)
    half = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    equal(m.expected(half, 8, 4), [1.5, 6.0], "0.5 · 0 + 0.25 · 2 + 0.25 · 4: bins of two steps begin at 0 2 4 6")
    steps = torch.arange(400)
    for cap, bins in ((140, 50), (100, 50), (300, 300), (7, 4)):
        own = tokens.StepsToGo(cap, bins)
        equal(m.encode(steps, cap, bins), own.encode(steps)[:, 0], f"tokens.StepsToGo({cap}, {bins}) differs")
        p = torch.rand(5, bins, generator=seeded()).softmax(1)
        equal(m.expected(p, cap, bins), p @ own.edges, f"Equation 1 with StepsToGo({cap}, {bins}).edges differs")


def ex03_numbers(m) -> None:
    action = torch.tensor([[0.030, -0.015], [0.0, 0.0061]])
    got = m.encode(action, 0.03)
    equal(got, [[11, 10, 12, 5], [11, 0, 11, 2]], "sign, magnitude, sign, magnitude: 11 is +, 12 is -")
    got = m.encode(torch.tensor([[-0.0014, 0.0016]]), 0.03)
    equal(got, [[11, 0, 11, 1]], "to the nearest of 0, 3, 6 ... mm; what rounds to zero is +0, one token for one thing")
    got = m.encode(torch.tensor([[0.09, -1.0]]), 0.03)
    equal(got, [[11, 10, 12, 10]], "beyond the limit is the limit: a magnitude of 11 would be a sign")
    equal(m.decode(torch.tensor([[11, 10, 12, 5]]), 0.03), [[0.03, -0.015]], "decode is the way back")
    action = (torch.rand(10_000, 2, generator=seeded()) * 2 - 1) * 0.03
    own = tokens.SignMagnitude(0.03, 2)
    equal(m.encode(action, 0.03), own.encode(action), "tokens.SignMagnitude.encode differs")
    back = m.decode(m.encode(action, 0.03), 0.03)
    equal(back, own.decode(own.encode(action)), "tokens.SignMagnitude.decode differs")
    worst = (back - action).abs().max().item()
    assert worst <= 0.0015001, f"10,000 actions come back up to {1000 * worst:.2f} mm off: half a step is 1.5 mm"


def ex04_returns(m) -> None:
    d = torch.tensor([[10.0, 8.0, 9.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    equal(m.rewards(d), [[2.0, -1.0, 7.0], [0.0, 0.0, 0.0]], "Eq. 2: from 10 to 8 steps to go is +2; the last step counts")
    reward = torch.tensor([[2.0, -1.0, 8.0]])
    lesson = "from behind: 8, then -1 + 0.5 · 8 = 3, then 2 + 0.5 · 3"
    equal(m.monte_carlo_returns(reward, 0.5), [[3.5, 3.0, 8.0]], lesson)
    assert reward.tolist() == [[2, -1, 8]], "`reward` has changed: clone it first, the caller may still need it"
    equal(m.monte_carlo_returns(reward, 0.0), reward, "at γ = 0 only the next reward counts")
    d = 50 * torch.rand(6, 20, generator=seeded())
    equal(m.rewards(d), stage2.rewards(d), "stage2.rewards differs")
    for gamma in (0.0, 0.9, 1.0):
        own = stage2.monte_carlo_returns(stage2.rewards(d), gamma)
        equal(m.monte_carlo_returns(m.rewards(d), gamma), own, f"stage2.monte_carlo_returns differs at γ = {gamma}")
    lesson = "at γ = 1 the sum telescopes to d(o_t) - d(o_T+1)"
    equal(m.monte_carlo_returns(m.rewards(d), 1.0), d[:, :-1] - d[:, -1:], lesson)


def ex05_reinforce(m) -> None:
    log_prob = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = m.reinforce_loss(log_prob, torch.tensor([3.0, 0.0, -1.5]), 0.2)
    lesson = "-0.2 · (3 · -1 + 0 · -2 - 1.5 · -4) / 3"
    equal(loss.detach(), -0.2, lesson)
    loss.backward()
    equal(log_prob.grad, [-0.2, 0.0, 0.1], "descent must raise log p where R > 0, lower it where R < 0")
    policy = bandit.Policy()
    policy.scores.data = torch.randn(9, generator=seeded())
    p = policy.scores.softmax(0)
    exact = torch.autograd.grad(-0.05 * (p * bandit.VALUE).sum(), policy.scores)[0]
    expected = torch.zeros(9)
    for a in range(9):  # each answer's gradient, as often as it is sampled
        log_p = policy.log_prob(torch.zeros(1), torch.tensor([a]))
        loss = m.reinforce_loss(log_p, bandit.VALUE[a : a + 1], 0.05)
        expected += p[a].detach() * torch.autograd.grad(loss, policy.scores)[0]
    assert (expected - exact).abs().max() < 1e-3 * exact.abs().max(), (
        "the expected gradient is not the gradient of the expected return: log p, not p, and R as it is"
    )
    value = practised(lambda *args: one_update(m.reinforce_loss, *args), 60)
    assert value > 3, f"after 60 updates the value is {value:.2f}, not above 3"


def one_update(loss_of, policy, optimizer, rng) -> None:
    obs, answer, d = bandit.collect(policy, rng)
    loss = loss_of(policy.log_prob(obs, answer), stage2.rewards(d)[:, 0], bandit.C)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def practised(iteration, times: int, policy: bandit.Policy | None = None) -> float:
    """The policy's value on the bandit, at first 0.5, after so many iterations."""
    policy, rng = policy or bandit.Policy(), seeded()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(times):
        iteration(policy, optimizer, rng)
    return (policy.scores.softmax(0) * bandit.VALUE).sum().item()


def ex06_appendix_e(m) -> None:
    value = torch.tensor([[-3.0, -2.0, -4.0]])  # T = 2: V(o_1), V(o_2), V(o_3)
    lesson = "V is -3, -2, -4 and γ 0.5: rewards are 1, -2, so R is 0, -2; the paper's formula gives 1, 0"
    equal(m.missing_term(value, 0.5), [[-1.0, -2.0]], lesson)
    value = -20 * torch.rand(8, 13, generator=seeded())
    for gamma in (0.0, 0.5, 0.9, 1.0):
        returns = stage2.monte_carlo_returns(stage2.rewards(-value), gamma)
        ahead = stage2.monte_carlo_returns((1 - gamma) * value[:, 1:], gamma)
        printed = ahead - value[:, :-1]  # the paper's
        equal(printed + m.missing_term(value, gamma), returns, f"the paper's R and your term are not R at γ = {gamma}")
    value[:, -1] = 0
    equal(m.missing_term(value, 0.9), torch.zeros(8, 12), "an episode that ends in its goal lacks nothing: V(o_T+1) = 0")


def ex07_prefix_mask(m) -> None:
    drawn = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    got = m.prefix_mask(torch.ones(1, 3, dtype=torch.bool), 2)
    assert got.dtype == torch.bool, f"{got.dtype}, not bool"
    equal(got, torch.tensor([[drawn]], dtype=torch.bool), "the docstring's picture: the prefix sees all of itself")
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    got = m.prefix_mask(valid, 1)
    assert not got[0, 0, 2:, :2].any(), "padding is seen: a long question beside a short one would change its answer"
    assert got[0, 0].diagonal().all(), "a padding row does not see itself: of padding alone, softmax would make NaN"
    equal(got, model.prefix_mask(valid, 1), "model.prefix_mask differs")
    looks = behaviour(m.prefix_mask)
    assert looks["later"] < 1e-5, "a later answer token changes an earlier one's scores: it was read before it was said"
    assert looks["prompt"] > 1e-3, "the question's first word does not change the answer: the prefix is not seen"
    assert looks["cache"] < 1e-4, "decoding with and without cache differ"


def behaviour(mask) -> dict[str, float]:
    """How much scores change in a tiny model with this mask: by a later answer token, by the prompt, by the cache."""
    torch.manual_seed(0)
    sizes = model.EFMConfig(width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=16)
    efm = model.EFM(sizes, tokens.Tokenizer.train(["red goal", "blue goal"]))
    obs, ranges, own = {}, [(0, 8)] * 3, model.prefix_mask
    try:
        model.prefix_mask = mask
        with torch.no_grad():
            plain = efm.log_probs(obs, ["red goal"], torch.tensor([[1, 2, 3]]), ranges)
            later = efm.log_probs(obs, ["red goal"], torch.tensor([[1, 7, 3]]), ranges)
            prompt = efm.log_probs(obs, ["blue goal"], torch.tensor([[1, 2, 3]]), ranges)
            cached, entropy = efm.sample(obs, ["red goal"], ranges, greedy=True)
            log_p = torch.stack(efm.log_probs(obs, ["red goal"], cached, ranges), 1)  # (1, 3, 8), not cached
    finally:
        model.prefix_mask = own
    off = (-(log_p.exp() * log_p).sum(-1) - entropy).abs().max().item()
    changed = {"later": (plain[1] - later[1]).abs().max().item(), "cache": off}
    return changed | {"prompt": (plain[0] - prompt[0]).abs().max().item()}


def ex08_detector(m) -> None:
    detected = torch.tensor([1, 1, 1, 0, 0, 0, 0]).bool()
    truth = torch.tensor([1, 1, 0, 1, 1, 0, 0]).bool()
    want = {"true_positives": 2, "false_positives": 1, "false_negatives": 2, "true_negatives": 2}
    got = m.confusion(detected, truth)
    assert got == want, f"{got} should be {want}: positive is what the detector says, false if the truth disagrees"
    own = rollout.confusion(detected.numpy(), truth.numpy())
    assert all(own[name] == n for name, n in got.items()), "rollout.confusion differs"
    far = [9.0, 8.0, 7.0, 6.0, 5.0]
    d = torch.tensor([[9.0, 2.0, 1.0, 0.0, 0.0], [9.0, 1.0, 5.0, 6.0, 7.0], far, [9.0, 8.0, 0.5, 3.0, 3.0]])
    truth = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    for s, want, lesson in (
        (2.0, [True, False, True], "first detected at times 1, 1, 2: true by 3, 3, 4? What was before does not count"),
        (1.0, [True, False, True], "first detected at times 2, 1, 2; the third episode has no detection, so no entry"),
        (0.5, [True, True], "half a step is rounded up: detected at time 2, the last episode may be true at 3"),
        (3.0, [True, True, True], "with s = 3 all are right in time: the claim is weaker"),
    ):
        got = m.confirmed_within(d, truth, s)
        assert got == want, f"s = {s}: {got} should be {want}. {lesson}"
    d = 10 * torch.rand(200, 15, generator=seeded())
    truth = torch.rand(200, 15, generator=seeded(1)) < 0.1
    for s in (0.5, 1.0, 3.0):
        own = rollout.confirmed_detections(d.numpy(), truth.numpy(), s)
        assert m.confirmed_within(d, truth, s) == own, f"rollout.confirmed_detections differs at s = {s}"


class Watched(bandit.Policy):
    """A bandit's policy that notes which tuples each update reads."""

    def __init__(self):
        super().__init__()
        self.read: list[list[int]] = []

    def log_prob(self, obs: Tensor, answer: Tensor) -> Tensor:
        self.read.append(obs.tolist())
        return super().log_prob(obs, answer)


class WatchedAdam(torch.optim.Adam):
    """Notes whether gradients were cleared before each step."""

    cleared, steps = 0, 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)

    def step(self, closure=None) -> None:
        self.steps += 1
        super().step(closure)


def ex09_algorithm1(m) -> None:
    policy, rng = Watched(), seeded()
    optimizer = WatchedAdam(policy.parameters(), lr=0.1)
    for _ in range(3):
        before = len(policy.read)
        m.iteration(policy, optimizer, rng)
        updates = policy.read[before:]
        assert len(updates) == bandit.N, f"line 7: {len(updates)} updates in an iteration, not N = {bandit.N}"
        sizes = {len(names) for names in updates}
        assert sizes == {bandit.B}, f"line 7: updates of {sizes} tuples, not B = {bandit.B}"
    names = sum(policy.read, [])
    assert len(set(names)) == len(names), "a tuple was used twice: one pass (line 7), and an empty buffer after it (line 8)"
    fresh, again = [], seeded()
    for _ in range(6):
        fresh += bandit.collect(bandit.Policy(), again)[0].tolist()
    first = sum(policy.read[: bandit.N], [])
    assert set(first) <= set(fresh), "line 2: the first updates use other tuples than those of the first rollouts"
    assert first != fresh[: len(first)], "line 7: the buffer was not shuffled"
    assert optimizer.steps == 3 * bandit.N, "line 7: one optimizer.step() an update"
    assert optimizer.cleared >= optimizer.steps, "old gradients add up: optimizer.zero_grad() before each backward()"
    value = practised(m.iteration, 60 // bandit.N)
    assert value > 3, f"after 60 updates the value is {value:.2f}, not above 3: are rewards and returns the right way round?"
