"""The grammar of Language-Table against what was counted in Language-Table itself."""

from __future__ import annotations

import numpy as np
import pytest

from envs.tabletop_language import (
    BLOCK_SETS,
    DIRECTIONS,
    FAMILIES,
    PLACES,
    Meaning,
    enumerated,
    instructions,
    meanings,
    names,
    sample,
    texts,
)

COUNTS = {  # measured in Language-Table: distinct strings with full names, for 4 and for 8 blocks
    "block2block": (192, 896),
    "block2absolutelocation": (372, 744),
    "block2relativelocation": (10_368, 20_736),
    "block2block_relative_location": (1_560, 7_280),
    "separate_blocks": (36, 144),
}
POINT2BLOCK = {
    "point",
    "at",
    "arm",
}  # the words that only its sixth family, which is not ours, has; in (52, 104) strings


def words(sentences: list[str]) -> set[str]:
    """Words as the nano models' tokenizer has them: a comma is one of its own."""
    return {w for s in sentences for w in s.replace(",", " ,").split()}


# --- enumerated: every number of Language-Table -------------------------------------------------------------
@pytest.mark.parametrize("blocks", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_enumerated_counts(family, blocks):
    strings = enumerated(family, blocks)
    assert len(strings) == len(set(strings)) == COUNTS[family][blocks == 8]


@pytest.mark.parametrize(("blocks", "unique", "vocabulary", "longest"), [(4, 12_580 - 52, 57, 76), (8, 29_904 - 104, 60, 78)])
def test_enumerated_totals(blocks, unique, vocabulary, longest):
    strings = {s for f in FAMILIES for s in enumerated(f, blocks)}
    assert len(strings) == unique
    spaced = {w for s in strings for w in s.split(" ")}  # as Language-Table counts: "moon," is a word
    assert not spaced & POINT2BLOCK and len(spaced | POINT2BLOCK) == vocabulary
    assert max(map(len, strings)) == longest


@pytest.mark.parametrize("blocks", [4, 8])
def test_enumerated_and_sampled_verbs_differ(blocks):
    absolute, relative = "block2absolutelocation", "block2block_relative_location"
    assert any(s.startswith("put the") for s in instructions([absolute], blocks))
    assert not any(s.startswith("put the") for s in enumerated(absolute, blocks))
    assert any(s.startswith("bring the") for s in enumerated(relative, blocks))
    assert not any(s.startswith("bring the") for s in instructions([relative], blocks))


# --- names --------------------------------------------------------------------------------------------------
def test_names():
    assert names(0, 4) == ["red moon", "red block", "moon"]
    assert all(len(names(b, 4)) == 3 for b in range(4))
    assert all(names(b, 8) == [BLOCK_SETS[8][b]] for b in range(8))
    for blocks in BLOCK_SETS:  # no name is two blocks'
        called = [n for b in range(blocks) for n in names(b, blocks)]
        assert len(BLOCK_SETS[blocks]) == blocks and len(called) == len(set(called))


# --- samples ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blocks", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_texts_and_instructions(family, blocks):
    rng, some, known = np.random.default_rng(0), meanings(family, blocks), set(instructions([family], blocks))
    assert len(some) == len(set(some))
    for i in rng.integers(len(some), size=200):
        can = texts(some[i], blocks)
        assert sample(some[i], blocks, rng) in can
        assert len(can) == len(set(can)) and known.issuperset(can)


@pytest.mark.parametrize(
    ("meaning", "blocks", "count"),
    [
        (Meaning("block2block", 0, 1), 8, 4 * 4),
        (Meaning("block2block", 0, 1), 4, 4 * 3 * 4 * 3),
        (Meaning("block2absolutelocation", 2, "top"), 8, 4 * 3),
        (Meaning("block2relativelocation", 0, ("left", "far")), 8, 3 * 2),
        (Meaning("block2relativelocation", 0, ("up", "near")), 8, 3 * 2 * (1 + 5 + 5)),
        (Meaning("block2relativelocation", 0, ("up left", "far")), 8, 3 * 2 * 2 * 4),
        (Meaning("block2block_relative_location", 0, ("up", 3)), 8, 4 * 3),
        (Meaning("separate_blocks", 0, (3,)), 8, 3),
        (Meaning("separate_blocks", 3, (1, 2, 0)), 8, 3 * (1 + 3)),
        (Meaning("separate_blocks", 7, (0, 1, 2, 3, 4, 5, 6)), 8, 3 * 3),
    ],
)
def test_samples_cover_texts(meaning, blocks, count):
    rng = np.random.default_rng(1)
    can = texts(meaning, blocks)
    assert len(can) == count
    assert {sample(meaning, blocks, rng) for _ in range(30 * count)} == set(can)


def test_samples_are_reproducible():
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [sample(m, 4, rng) for f in FAMILIES for m in meanings(f, 4)]

    assert draw(3) == draw(3) != draw(4)


def test_sampling_is_uniform_choice_by_choice():
    """ "slightly" at the front is one of three forms, not one of eleven; and three neighbours are a group
    every other time."""
    rng = np.random.default_rng(0)
    near = [sample(Meaning("block2relativelocation", 0, ("up", "near")), 8, rng) for _ in range(3000)]
    assert np.mean([s.startswith("slightly") for s in near]) == pytest.approx(1 / 3, abs=0.04)  # 4.6 standard errors
    three = [sample(Meaning("separate_blocks", 0, (1, 2, 3)), 4, rng) for _ in range(3000)]
    assert np.mean(["," in s for s in three]) == pytest.approx(1 / 2, abs=0.04)


def test_sentences():
    assert "push the red moon diagonally up and to the left" in texts(Meaning("block2relativelocation", 0, ("up left", "far")), 8)
    assert "slide the moon a little bit downwards" in texts(Meaning("block2relativelocation", 0, ("down", "near")), 4)
    assert "put the cube to the towards your base" in texts(Meaning("block2absolutelocation", 1, "top"), 4)
    assert "move the star just right of the blue block" in texts(Meaning("block2block_relative_location", 2, ("right", 1)), 4)
    three = texts(Meaning("separate_blocks", 0, (2, 1, 3)), 4)
    assert {
        "separate the red moon from the star, blue cube, and yellow block",
        "separate the moon from the clump",
    } < set(three)
    assert "pull the red moon apart from the blue cube and red pentagon" in texts(Meaning("separate_blocks", 0, (3, 1)), 8)


# --- instructions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("blocks", "longest"), [(4, 78), (8, 81)])
def test_instructions(blocks, longest):
    every = instructions(FAMILIES, blocks)
    assert len(every) == len(set(every))
    assert max(map(len, every)) == longest  # three neighbours with long names: more than Language-Table enumerates
    assert "rest" not in words(every)
    known = set(every)
    rng = np.random.default_rng(0)  # neighbours in any order and number, also those that `meanings` leaves out
    for _ in range(300):
        block, *others = rng.permutation(blocks)[: rng.integers(2, blocks + 1)].tolist()
        assert set(texts(Meaning("separate_blocks", block, tuple(others)), blocks)) <= known
    only = words(instructions(["block2block"], blocks))
    assert only < words(every) and "slightly" not in only


# --- geometry -----------------------------------------------------------------------------------------------
def test_directions_match_their_words():
    parts = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    assert len(DIRECTIONS) == 8
    for name, vector in DIRECTIONS.items():
        total = np.sum([parts[p] for p in name.split()], 0)
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-15)
        told = {w for t in texts(Meaning("block2relativelocation", 0, (name, "far")), 8) for w in t.split()}
        assert {p for p in parts if p in told} == set(name.split())
        beside = {
            "up": {"above", "top", "up"},
            "down": {"below", "bottom", "down"},
            "left": {"left"},
            "right": {"right"},
        }
        for t in texts(Meaning("block2block_relative_location", 0, (name, 1)), 8):
            assert {p for p, some in beside.items() if some & set(t.split())} == set(name.split())


def test_places_match_their_words():
    x = {"top": 0.125, "upper": 0.125, "base": 0.125, "bottom": 0.575, "lower": 0.575}
    y = {"left": -0.3048, "right": 0.3048}
    assert len(PLACES) == 9
    for name, place in PLACES.items():
        for t in texts(Meaning("block2absolutelocation", 0, name), 8):
            said = t.split()
            assert place == (
                max([x[w] for w in said if w in x], default=0.35),
                sum(y[w] for w in said if w in y),
            )
