"""Actions, steps to go and words as tokens, against arithmetic; every domain's words and actions."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch

import envs
from tests.test_model import INSTRUCTIONS, questions
from tokens import (
    N_LOC,
    QUESTION_ACTION,
    QUESTION_INSTRUCTION,
    QUESTION_STEPS,
    SignMagnitude,
    StepsToGo,
    Tokenizer,
    UniformBins,
    action_tokenizer,
)


# --- numbers as tokens ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokens",
    [UniformBins(21, -3e-4, 3e-4, 2), UniformBins(256, [-1.0, 0.0], [2.0, 0.5], 2), UniformBins(7, 0, 1, 2)],
)
def test_uniform_bins(tokens, rng):
    every = torch.arange(tokens.bins)[:, None].expand(-1, 2)
    assert torch.equal(tokens.encode(tokens.decode(every)), every)
    assert tokens.ranges == [(0, tokens.bins)] * 2
    action = tokens.low + torch.rand(5000, 2, generator=rng) * (tokens.high - tokens.low)
    half_bin = (tokens.high - tokens.low) / tokens.bins / 2
    error = (tokens.decode(tokens.encode(action)) - action).abs()
    assert (error <= half_bin * (1 + 1e-4)).all() and (error.max(0).values > 0.9 * half_bin).all()
    assert tokens.encode(torch.stack([tokens.low - 9, tokens.low, tokens.high, tokens.high + 9])).tolist() == \
        [[0, 0], [0, 0], [tokens.bins - 1] * 2, [tokens.bins - 1] * 2]  # fmt: skip


def test_uniform_bins_with_an_odd_number_of_bins_can_do_nothing():
    tokens = UniformBins(21, -3e-4, 3e-4, 2)
    assert tokens.encode(torch.zeros(2)).tolist() == [10, 10]
    assert tokens.decode(torch.tensor([10, 10])).abs().max() < 1e-10


def test_sign_magnitude_round_trips():
    tokens = SignMagnitude(limit=0.1, dims=2)
    every = torch.tensor([[s, m] for s in (11, 12) for m in range(11) if not (s == 12 and m == 0)])  # 21 numbers: zero is +0
    pairs = torch.stack([torch.cat([a, b]) for a in every for b in every])
    assert torch.equal(tokens.encode(tokens.decode(pairs)), pairs)
    assert tokens.ranges == [(11, 13), (0, 11)] * 2
    assert tokens.decode(torch.tensor([11, 10, 12, 3])).tolist() == pytest.approx([0.1, -0.03])


def test_sign_magnitude_quantises_clamps_and_has_no_minus_zero(rng):
    tokens = SignMagnitude(limit=0.1, dims=2)
    action = (torch.rand(5000, 2, generator=rng) * 2 - 1) * 0.1
    error = (tokens.decode(tokens.encode(action)) - action).abs()
    assert error.max() <= 0.005 * (1 + 1e-4) and error.max() > 0.0045
    assert tokens.encode(torch.tensor([7.0, -7.0])).tolist() == [11, 10, 12, 10]
    assert tokens.encode(torch.tensor([0.0, -0.0])).tolist() == [11, 0, 11, 0]
    assert tokens.encode(torch.tensor([0.004, -0.004])).tolist() == [11, 0, 11, 0]
    assert tokens.decode(torch.tensor([12, 0, 11, 0])).tolist() == [0, 0]  # a model may still say -0


@pytest.mark.parametrize(("cap", "bins"), [(140, 140), (140, 50), (200, 100), (60, 7), (10, 5)])
def test_steps_to_go_labels(cap, bins):
    steps = StepsToGo(cap, bins)
    n = torch.arange(2 * cap)
    expected = [min(i * bins // cap, bins - 1) for i in range(2 * cap)]  # exact, in integers
    assert steps.encode(n)[:, 0].tolist() == expected
    assert steps.ranges == [(0, bins)] and steps.encode(n).shape == (2 * cap, 1)
    assert steps.edges.tolist() == pytest.approx([k * cap / bins for k in range(bins)])
    assert steps.encode(torch.tensor([0])).tolist() == [[0]] and steps.edges[0] == 0  # so d can reach 0


def test_action_tokenizer_builds_what_the_domains_ask_for():
    for domain in envs.DOMAINS:
        env = envs.make_vec(domain, 1)
        tokens = action_tokenizer(**env.action_tokens)
        limits = torch.tensor(np.stack([env.single_action_space.low, env.single_action_space.high]))
        if isinstance(tokens, SignMagnitude):  # a tabletop takes longer steps than tokens ask of it, as LanguageTable does
            assert tokens.limit <= limits[1].min()
            limits = limits.clamp(-tokens.limit, tokens.limit)
        assert (tokens.decode(tokens.encode(limits)) - limits).abs().max() <= (limits[1] - limits[0]).max() / 20
        assert max(end for _, end in tokens.ranges) <= N_LOC and env.steps_bins <= N_LOC
    assert isinstance(action_tokenizer("sign-magnitude", limit=0.1, dims=2), SignMagnitude)


# --- words as tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("domain", list(envs.DOMAINS))
def test_tokenizer_knows_every_word_of_a_domain(domain):
    env = envs.make_vec(domain, 1)
    texts = env.instructions()
    asked = [QUESTION_INSTRUCTION] * env.predicts_instruction
    tokenizer = Tokenizer.train([*texts, *env.state_names, *asked])
    unk = tokenizer.tokenizer.token_to_id("<unk>")
    prompts = [q.format(g) for q in (QUESTION_ACTION, QUESTION_STEPS) for g in texts] + asked
    ids, valid = tokenizer.prompts(prompts)
    assert not (ids == unk).any()
    for row, ok, prompt in zip(ids, valid, prompts, strict=True):
        bos, *words, newline = [tokenizer.tokenizer.id_to_token(i) for i in row[ok].tolist()]
        assert (bos, " ".join(words), newline) == ("<bos>", prompt, "\n")
    for name in env.state_names:
        assert unk not in tokenizer.tokenizer.encode(name, add_special_tokens=False).ids
    assert unk in tokenizer.tokenizer.encode("xyzzy", add_special_tokens=False).ids  # so the assertions above can fail


def test_questions_of_different_texts_are_different_tokens():
    tokenizer = Tokenizer.train(INSTRUCTIONS)
    ids, _ = tokenizer.prompts(questions(6))
    assert len({tuple(row) for row in ids.tolist()}) == 6


def test_number_tokens_are_contiguous():
    tokenizer = Tokenizer.train(INSTRUCTIONS)
    ids = [tokenizer.tokenizer.token_to_id(f"<loc{i:04d}>") for i in range(N_LOC)]
    assert ids == list(range(tokenizer.loc, tokenizer.loc + 1024))
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos, *ids}) == 1027
    assert tokenizer.tokenizer.encode("<loc0007>", add_special_tokens=False).ids == [tokenizer.loc + 7]


def test_a_tokenizer_without_number_tokens_is_refused():
    with pytest.raises(ValueError, match="<loc0000>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")))


def test_texts_survive_the_tokenizer():
    texts = [*INSTRUCTIONS, "pull the red block apart from the blue cube, the moon, and the star"]
    tokenizer = Tokenizer.train(texts)
    ids, valid = tokenizer.answers(texts)
    assert not valid.all() and valid[:, 0].all() and not (valid[:, 1:] > valid[:, :-1]).any()  # padded on the right
    assert ((ids == tokenizer.eos).sum(1) == 1).all() and (ids[~valid] == tokenizer.pad).all()
    assert [tokenizer.text(row) for row in ids.tolist()] == texts
    assert tokenizer.text([]) == tokenizer.text([tokenizer.eos]) == ""
