"""The instructions of Google's Language-Table (google-research/language-table, Apache-2.0).

Its grammar as data, in own code.

A Meaning is what a task asks for; its sentences are one `Choice`, which `sample` draws from and `texts`
writes out.

    family                         target                                  a sentence
    block2block                    another block                           slide the moon next to the star
    block2absolutelocation         a name in PLACES                        put the red moon to the top side
    block2relativelocation         (a name in DIRECTIONS, "near" | "far")  push the red moon slightly up
    block2block_relative_location  (a name in DIRECTIONS, another block)   move the moon below the blue cube
    separate_blocks                its neighbours, nearest first           separate the moon from the clump

A block is its index in BLOCK_SETS[blocks]. Language-Table *samples* sentences for its tasks and *enumerates*
others for its vocabulary: `_choice` says how they differ. Neither has its "rest of the blocks": its code
always overwrites those words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

Choice = str | list | tuple  # words | a uniform choice of one of the items | all the items, in order

BLOCK_SETS = {
    4: ("red moon", "blue cube", "green star", "yellow pentagon"),
    8: (
        "red moon",
        "red pentagon",
        "blue moon",
        "blue cube",
        "green cube",
        "green star",
        "yellow star",
        "yellow pentagon",
    ),
}
PLACES = {  # (x, y) in metres: x grows downwards in the image, y to its right
    "top": (0.125, 0.0), "top_left": (0.125, -0.3048), "top_right": (0.125, 0.3048),
    "center": (0.35, 0.0), "center_left": (0.35, -0.3048), "center_right": (0.35, 0.3048),
    "bottom": (0.575, 0.0), "bottom_left": (0.575, -0.3048), "bottom_right": (0.575, 0.3048),
}  # fmt: skip
_D = 0.5**0.5
DIRECTIONS = {  # unit (x, y)
    "up": (-1.0, 0.0), "down": (1.0, 0.0), "left": (0.0, -1.0), "right": (0.0, 1.0),
    "up left": (-_D, -_D), "up right": (-_D, _D), "down left": (_D, -_D), "down right": (_D, _D),
}  # fmt: skip

_THREE = ["move the", "push the", "slide the"]
PUSH = ["push the", "move the", "slide the", "put the"]
_VERBS = {  # family: sampled, enumerated
    "block2block": (PUSH, PUSH),
    "block2absolutelocation": (PUSH, _THREE),
    "block2relativelocation": (_THREE, _THREE),
    "block2block_relative_location": (PUSH, [*PUSH, "bring the"]),
    "separate_blocks": ([], []),  # verbs of its own
}
FAMILIES = tuple(_VERBS)
_NEAR_BLOCK = ["to the", "towards the", "close to the", "next to the"]
_PLACE = {  # after "to the": "to the towards your base" is Language-Table's own
    "top": ["top side", "top", "towards your base"],
    "top_left": ["top left of the board", "top left", "upper left corner", "top left corner"],
    "top_right": ["top right of the board", "top right", "upper right corner", "top right corner"],
    "center": ["middle of the board", "center of the board", "center", "middle"],
    "center_left": ["left side of the board", "center left", "left side"],
    "center_right": ["right side of the board", "center right", "right side"],
    "bottom": ["bottom side", "bottom"],
    "bottom_left": ["bottom left of the board", "bottom left", "lower left corner", "bottom left corner"],
    "bottom_right": [
        "bottom right of the board",
        "bottom right",
        "lower right corner",
        "bottom right corner",
    ],
}
_WAY = dict(
    up=["up", "upwards"],
    down=["down", "downwards"],
    left=["to the left", "left"],
    right=["to the right", "right"],
)
_SLIGHTLY = ["slightly", "a bit", "a little", "a little bit", "somewhat"]
_BESIDE = {
    "up": ["above the", "to the top side of the", "to the top of the"],
    "down": ["below the", "to the bottom side of the", "to the bottom of the"],
    "left": ["just left of the", "to the left of the", "left of the", "to the left side of the"],
    "right": ["just right of the", "to the right of the", "right of the", "to the right side of the"],
    "up left": [
        "to the top left side of the",
        "to the top left of the",
        "diagonally up and to the left of the",
    ],
    "up right": [
        "to the top right side of the",
        "to the top right of the",
        "diagonally up and to the right of the",
    ],
    "down left": [
        "to the bottom left side of the",
        "to the bottom left of the",
        "diagonally down and to the left of the",
    ],
    "down right": [
        "to the bottom right side of the",
        "to the bottom right of the",
        "diagonally down and to the right of the",
    ],
}
_SEPARATE = (("pull the", "apart from the"), ("move the", "away from the"), ("separate the", "from the"))
_GROUP = ["group", "clump", "group of blocks"]


class Meaning(NamedTuple):
    family: str
    block: int
    target: int | str | tuple


def names(block: int, blocks: int) -> list[str]:
    """What a block may be called: in full; "<colour> block" if no other has its colour; "<shape>" if no other
    has its shape."""
    colour, shape = BLOCK_SETS[blocks][block].split()
    words = " ".join(BLOCK_SETS[blocks]).split()
    return [
        f"{colour} {shape}",
        *[f"{colour} block"] * (words.count(colour) == 1),
        *[shape] * (words.count(shape) == 1),
    ]


def meanings(family: str, blocks: int) -> list[Meaning]:
    """Every meaning of a family; but four neighbours or more, whom no sentence names, stand here once for
    each block."""

    def targets(block: int) -> Iterable:
        others = [b for b in range(blocks) if b != block]
        named = [t for k in (1, 2, 3) for t in itertools.permutations(others, k)]
        return {
            "block2block": others,
            "block2absolutelocation": PLACES,
            "block2relativelocation": itertools.product(DIRECTIONS, ("near", "far")),
            "block2block_relative_location": itertools.product(DIRECTIONS, others),
            "separate_blocks": [*named, *[tuple(others[:4])] * (len(others) > 3)],
        }[family]

    return [Meaning(family, b, t) for b in range(blocks) for t in targets(b)]


def _choice(meaning: Meaning, blocks: int, enumerating: bool = False) -> Choice:
    """A meaning's sentences, as they are sampled, or as they are enumerated: full names, other verbs, no
    group of three."""
    family, block, target = meaning

    def name(b: int, comma: str = "") -> list[str]:
        return [n + comma for n in names(b, blocks)[: 1 if enumerating else None]]

    verb, who = _VERBS[family][enumerating], name(block)
    if family == "block2block":
        return verb, who, _NEAR_BLOCK, name(target)
    if family == "block2absolutelocation":
        return verb, who, "to the", _PLACE[target]
    if family == "block2block_relative_location":
        return verb, who, _BESIDE[target[0]], name(target[1])
    if family == "block2relativelocation":
        a, *b = [_WAY[d] for d in target[0].split()]
        way = (
            [(a, "and", *b), (a, "and then", *b), ("diagonally", a, "and", *b), (a, "and", *b, "diagonally")]
            if b
            else a
        )
        near = [("slightly", verb, who, way), (verb, who, _SLIGHTLY, way), (verb, who, way, _SLIGHTLY)]
        return near if target[1] == "near" else (verb, who, way)
    others: Choice = _GROUP
    if len(target) <= 2:
        others = tuple(x for b in target for x in ("and", name(b)))[1:]
    elif len(target) == 3:
        listed = (name(target[0], ","), name(target[1], ","), "and", name(target[2]))
        others = listed if enumerating else [listed, _GROUP]
    return [(a, who, b, others) for a, b in _SEPARATE]


def _expand(choice: Choice) -> list[str]:
    if isinstance(choice, str):
        return [choice]
    parts = [_expand(c) for c in choice]
    return sum(parts, []) if isinstance(choice, list) else [" ".join(p) for p in itertools.product(*parts)]


def _draw(choice: Choice, rng: np.random.Generator) -> str:
    if isinstance(choice, list):
        return _draw(choice[rng.integers(len(choice))], rng)
    return choice if isinstance(choice, str) else " ".join(_draw(c, rng) for c in choice)


def sample(meaning: Meaning, blocks: int, rng: np.random.Generator) -> str:
    """One sentence. Each choice in it is uniform, as in Language-Table; so not every sentence is as likely as
    another."""
    return _draw(_choice(meaning, blocks), rng)


def texts(meaning: Meaning, blocks: int) -> list[str]:
    """Every sentence that `sample` can say for this meaning, once."""
    return _expand(_choice(meaning, blocks))


def instructions(families: Iterable[str], blocks: int) -> list[str]:
    """Every sentence that `sample` can say for these families, once."""
    return list(dict.fromkeys(t for f in families for m in meanings(f, blocks) for t in texts(m, blocks)))


def enumerated(family: str, blocks: int) -> list[str]:
    """Every sentence that Language-Table enumerates, once."""
    some = meanings(family, blocks)
    if family == "separate_blocks":  # there, from the first k blocks for every k, even if that is from itself
        some = [Meaning(family, b, tuple(range(k))) for b in range(blocks) for k in range(1, blocks)]
    return list(dict.fromkeys(t for m in some for t in _expand(_choice(m, blocks, enumerating=True))))
