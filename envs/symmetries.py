"""What is as true turned round: the symmetries of a domain, for the batches of Stage 1 and, on the pointmass, Stage 2.

A symmetry maps a tuple (observation, action, instruction) to another that the domain could have shown just as well; the steps
to go stay. What `turned()` adds is true of the goal and the way to it, and not of all that a demonstrator does: its classes say
of what. The paper has none: its model has seen the web, a nano model has not, and this is what it would have known.

A domain's symmetries are finite, and a group but for places and arrangements. Elements are numbered; number 0 changes
nothing. A tuple's element is drawn anew each time that the tuple is in a batch:

    g = rng.integers(symmetries.order, size=B)
    obs, action, goals = symmetries(g, obs, action, goals)

    class                domain, obs                    elements
    PointmassSymmetries  pointmass, states and images   8 of the square x 6 permutations of the colours
                         states, `turned()`             the same x 36 turns x 256 places x 1024 arrangements
    TabletopSymmetries   tabletop and banana, states    the mirror x B! permutations of the B blocks
                         tabletop, `turned()`           the same x 36 turns x 256 places
                         of block2block alone           the same x 1024 arrangements
                         images, look=sim               the mirror
    AlohaSymmetries      aloha, states                  the mirror
    Symmetries           all others                     1

`tests/test_symmetries.py` replays transformed demonstrations in the simulators.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import torch
from torch import Tensor

from tokens import SignMagnitude, UniformBins


class Symmetries:
    """The group of one element, and what every group offers. g int (B,) numbers an element per tuple."""

    order = 1

    def __call__(
        self, g: np.ndarray, obs: dict[str, Tensor], action: Tensor | None, goals: list[str]
    ) -> tuple[dict[str, Tensor], Tensor | None, list[str]]:
        """The tuples, each transformed by its element.

        obs: state (B, S, d), or of two moments (B, 2, S, d); or images (B, 2, H, W, 3). action float (B, A), None where
        there is none. goals: B instructions.
        """
        if not g.any():
            return obs, action, goals
        changed = {key: getattr(self, key)(g, value) for key, value in obs.items()}
        goals = [self.words(k, text) for k, text in zip(g.tolist(), goals, strict=True)]
        return changed, action if action is None else self.action(g, action), goals

    def of_tokens(
        self,
        obs: dict[str, Tensor],
        tokens: Tensor,
        goals: list[str],
        actions: UniformBins | SignMagnitude,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        """Tuples of practice, actions as tokens long (B, L), each transformed by an element that is drawn here.

        Their returns stay right, but the policy has not drawn this action there: it is REINFORCE if it is symmetric.
        """
        g = torch.randint(self.order, (len(goals),), generator=generator).numpy()
        obs, action, goals = self(g, obs, actions.decode(tokens.cpu()), goals)
        return obs, actions.encode(action).to(tokens.device), goals

    def turned(self) -> Symmetries:
        """These, and scenes turned by any angle, put elsewhere and rearranged, where the domain has it: `--turns True`."""
        return self


TURNS = 36  # angles, ten degrees apart
PLACES = 16  # of a turned scene along each axis, over all the room that it has
ARRANGEMENTS = 1024  # of the goals, or blocks, that the sentence does not name
TRIES = 4  # places that an arrangement has for each of them


def rotated(angle: Tensor, vectors: Tensor) -> Tensor:
    """Vectors float (B, ..., 2) of the plane, each turned by its angle (B,)."""
    angle = angle.float().view(-1, *[1] * (vectors.ndim - 2)).to(vectors.device)
    x, y = vectors.unbind(-1)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)


class SceneSymmetries(Symmetries):
    """What both tables share: scenes that can also be turned by any angle, put elsewhere and rearranged.

    An element is g = exact + unturned * (turn + turns * (x + places * (y + places * arrangement))), where x and y number the
    place. The exact ones are the domain's own, `unturned` of them. An arrangement has TRIES places for each of the things
    that a sentence may name, always the same ones: numbers from 0 to 1.
    """

    def __init__(self, unturned: int, turns: int, places: int, arrangements: int, things: int, numbers: int):
        self.unturned, self.turns, self.places, self.arrangements = unturned, turns, places, arrangements
        self.order = unturned * turns * places**2 * arrangements
        self.layouts = np.random.default_rng(0).uniform(size=(arrangements, things, TRIES, numbers))

    def numbered(self, g: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(turn, place along x and y, arrangement) of elements g: long (B,), (B, 2), (B,)."""
        number = torch.from_numpy(g // self.unturned)
        turn, number = number % self.turns, number // self.turns
        place = torch.stack([number % self.places, number // self.places % self.places], 1)
        return turn, place, number // self.places**2

    def shift(self, low: Tensor, high: Tensor, place: Tensor) -> Tensor:
        """How far a scene is moved that may be moved by low to high, float (B, 2) each."""
        return low + (high - low) * (place + 0.5) / self.places


def first_that_fits(
    places: Tensor, spots: Tensor, free: Tensor, may_move: Tensor, apart: float
) -> tuple[Tensor, Tensor]:
    """Things at places (B, K, 2), each in turn put on the first of its spots (B, K, TRIES, 2) that fits.

    A spot fits where it is free, bool (B, K, TRIES), and farther than `apart` from all other things. A thing that may not
    move, bool (B, K), or fits nowhere, stays. Returns which things have moved, bool (B, K), and to which spot, long (B, K).
    """
    places, moved, chosen = places.clone(), [], []
    rows = torch.arange(len(places))
    for k in range(places.shape[1]):
        others = [j for j in range(places.shape[1]) if j != k]
        fits = free[:, k] & (torch.cdist(spots[:, k], places[:, others]) > apart).all(2)  # (B, TRIES)
        moved.append(may_move[:, k] & fits.any(1))
        chosen.append(fits.int().argmax(1))
        places[:, k] = torch.where(moved[k][:, None], spots[rows, k, chosen[k]], places[:, k])
    return torch.stack(moved, 1), torch.stack(chosen, 1)


class PointmassSymmetries(SceneSymmetries):
    """The table is a square, the goals differ in colour alone, and those that the sentence does not name do nothing.

    turnable: whether `turned()` has more than the square and the colours: `elsewhere`.
    reach: how far from the middle of the table the point may be put, and its goal, along each axis.
    apart: how far goals that are put elsewhere are from the others, at least.
    The 48 exact elements are colours + 6 * square; from 48 on a scene is always put somewhere else. Four of the eight of
    the square are turns, too, so some turns are there twice.
    """

    reach, apart = (1.1, 0.9), 0.45

    def __init__(
        self, colours: tuple[str, ...], turnable: bool, turns: int = 1, places: int = 1, arrangements: int = 1
    ):
        self.colours, self.turnable = colours, turnable
        # row k: what stands in place of colour j afterwards was colour sources[k, j]
        self.sources = np.array(list(itertools.permutations(range(len(colours)))))  # (6, 3)
        self.renamed: dict[tuple[int, str], str] = {}  # the same few sentences are asked for again and again
        super().__init__(8 * len(self.sources), turns, places, arrangements, len(colours), 2)

    def turned(self) -> Symmetries:
        if not self.turnable:
            return self
        return PointmassSymmetries(self.colours, True, TURNS, PLACES, ARRANGEMENTS)

    def __call__(
        self, g: np.ndarray, obs: dict[str, Tensor], action: Tensor | None, goals: list[str]
    ) -> tuple[dict[str, Tensor], Tensor | None, list[str]]:
        obs, action, goals = super().__call__(g % self.unturned, obs, action, goals)
        if self.turns > 1 and obs["state"].ndim == 3:  # a pair of moments stays where it is
            state, action = self.elsewhere(g, obs["state"], action, goals)
            obs = {"state": state}
        return obs, action, goals

    def elsewhere(
        self, g: np.ndarray, state: Tensor, action: Tensor | None, goals: list[str]
    ) -> tuple[Tensor, Tensor | None]:
        """States float (B, 5, 2) turned, put elsewhere and rearranged; actions (B, 2) turned.

        On its last leg the demonstrator goes the same way, as it sees its goal turned with it. But first it passes by five
        places of its own choice, all over the table. In one moved tuple of three the place that it is on its way to now lies
        where none is chosen, in one of fifteen beyond the walls. So a clone is less drawn to such places: it wanders less
        than the demonstrators and comes to its goal sooner. One in a hundred turned actions is cut off where tokens end.
        A scene stays as it is where the goal is too far from the point, or where its sentence does not name one goal.
        """
        turn, place, arrangement = self.numbered(g)
        says = torch.tensor([[colour in goal.split(" ") for colour in self.colours] for goal in goals])
        named = says.int().argmax(1)  # (B,)
        device, state, rows = state.device, state.cpu(), torch.arange(len(goals))
        angle = turn * (2 * np.pi / self.turns)
        moved = rotated(angle, state)
        point = moved[:, 0]
        goal = point + moved[rows, 2 + named]  # (B, 2), from the middle of the table
        low, high = self.room(point, goal)
        moves = (low <= high).all(1) & (says.sum(1) == 1) & torch.from_numpy(g >= self.unturned)  # (B,)
        # what is seen from the point stays: velocity and goals
        moved = torch.cat([(point + self.shift(low, high, place))[:, None], moved[:, 1:]], 1)
        state = torch.where(moves[:, None, None], moved, state)
        if action is not None:
            action = torch.where(moves[:, None].to(action.device), rotated(angle, action), action)
        return self.rearranged(arrangement * moves, state, named).to(device), action

    def room(self, point: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The shifts that keep the point and its goal within their reach: the least and the greatest, float (B, 2) each."""
        low = torch.maximum(-self.reach[0] - point, -self.reach[1] - goal)
        high = torch.minimum(self.reach[0] - point, self.reach[1] - goal)
        return low, high

    def rearranged(self, arrangement: Tensor, state: Tensor, named: Tensor) -> Tensor:
        """States float (B, 5, 2), the goals that are not named where the tuples' arrangements have them; both long (B,).

        One that fits nowhere stays where the turned scene has it, seldom off the table; so do all in arrangement 0. Exact:
        nothing runs into a goal.
        """
        point = state[:, :1]
        drawn = 2 * self.layouts[arrangement.numpy()] - 1
        spots = torch.from_numpy(self.reach[1] * drawn).float()  # (B, 3, TRIES, 2), from the table's middle
        may_move = (arrangement > 0)[:, None] & (named[:, None] != torch.arange(len(self.colours)))  # (B, 3)
        free = torch.ones(spots.shape[:3], dtype=torch.bool)
        moved, chosen = first_that_fits(point + state[:, 2:], spots, free, may_move, self.apart)
        there = spots.take_along_dim(chosen[..., None, None], 2)[:, :, 0]  # (B, 3, 2)
        goals = torch.where(moved[..., None], there - point, state[:, 2:])
        return torch.cat([state[:, :2], goals], 1)

    def parts(self, g: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x and y change places, then the sign of x, the sign of y: bool (B,) each; sources long (B, 3))."""
        square, colours = np.divmod(g, len(self.sources))
        bits = [torch.from_numpy(square >> k & 1).bool() for k in range(3)]
        return *bits, torch.from_numpy(self.sources[colours])

    def vectors(self, g: np.ndarray, v: Tensor) -> Tensor:
        """Vectors float (B, ..., 2) of the plane."""
        swap, minus_x, minus_y, _ = self.parts(g)
        per_row = (-1, *[1] * (v.ndim - 1))
        v = torch.where(swap.view(per_row).to(v.device), v.flip(-1), v)
        signs = 1.0 - 2.0 * torch.stack([minus_x, minus_y], -1).float()  # (B, 2)
        return v * signs.view(-1, *[1] * (v.ndim - 2), 2).to(v.device)

    def state(self, g: np.ndarray, state: Tensor) -> Tensor:
        """(B, ..., 5, 2): position, velocity and the goals by colour."""
        source = self.parts(g)[3] + 2
        rows = torch.cat([torch.tensor([[0, 1]]).expand(len(g), 2), source], 1)  # (B, 5)
        rows = rows.view(-1, *[1] * (state.ndim - 3), 5, 1).to(state.device)
        return torch.take_along_dim(self.vectors(g, state), rows, -2)

    def images(self, g: np.ndarray, images: Tensor) -> Tensor:
        """(B, 2, H, W, 3): row 0 is the largest y, a goal brightens the channel of its colour, the rest is grey."""
        swap, minus_x, minus_y, source = (
            x.view(-1, 1, 1, 1, *x.shape[1:]).to(images.device) for x in self.parts(g)
        )
        images = torch.where(swap[..., None], images.transpose(2, 3).flip(2, 3), images)
        images = torch.where(minus_x[..., None], images.flip(3), images)
        images = torch.where(minus_y[..., None], images.flip(2), images)
        return torch.take_along_dim(images, source, -1)

    def action(self, g: np.ndarray, action: Tensor) -> Tensor:
        return self.vectors(g, action)

    def words(self, k: int, text: str) -> str:
        key = (k % len(self.sources), text)
        if key not in self.renamed:
            source = self.sources[key[0]].tolist()
            becomes = {self.colours[old]: self.colours[new] for new, old in enumerate(source)}
            self.renamed[key] = " ".join(becomes.get(word, word) for word in text.split(" "))
        return self.renamed[key]


BEHIND = 0.5  # [dm] from a block's middle to where the tool begins to push it: envs/tabletop.py's `reach`
CLEAR = 0.6  # [dm] from a way to the middle of a block that is not in the way; a demonstrator goes round nearer ones
GAP = 0.6  # [dm] between the middles of two blocks
# a sentence with one of these is about the table or the camera, and is not true of a scene that has been turned
DIRECTED = re.compile(
    r"\b(left|right|up|upwards|down|downwards|above|below|top|bottom|upper|lower|middle|center|base)\b"
)


class TabletopSymmetries(SceneSymmetries):
    """The table mirrored, y to -y; from states also the blocks' names exchanged, and the scene turned and put elsewhere.

    names: of each block, all that it may be called, equally many. Exchanging them is exact but for the shapes: a moon
    pushed where a cube was does not turn as the cube did.
    within: float (2, 2), the least and the greatest x, y [dm from the workspace's middle] of a turned scene; None: it
    must not be turned.
    turns: the angles that it may be turned by. Quarters are exact. Between them a pushed block goes a little another way,
    as its friction is per axis; and of 200 actions one is cut off where action tokens end.
    places: the scene then lies, along x and along y, at one of so many places, evenly over where all of it is `within`: the
    tool, its target and every block, of both moments of a pair.
    What the episode did later is not looked at. Of 40 tuples one comes from an episode that, there, would leave the tool's
    workspace, so it is not quite what a demonstrator would have done.
    arrangements: then the blocks that the sentence does not name are put elsewhere, too: `rearranged`. Arrangement 0 leaves
    them where they are, and so does each one of a pair of moments (instruction prediction).
    two_named: whether every sentence is "push A to B", else there are no arrangements.
    A tuple is neither turned nor moved nor rearranged where its sentence names a direction or a place, or where it would not fit.
    The 2 P exact elements are permutation + P * mirrored; they neither turn nor move a scene.
    """

    def __init__(
        self,
        names: list[list[str]],
        permute: bool,
        within: np.ndarray | None = None,
        two_named: bool = False,
        turns: int = 1,
        places: int = 1,
        arrangements: int = 1,
    ):
        self.names, self.count, self.permute, self.two_named = names, len(names), permute, two_named
        self.within = within
        self.every = (
            list(itertools.permutations(range(self.count))) if permute else [tuple(range(self.count))]
        )
        self.sources = np.array(self.every)  # (P, B): block j afterwards was block sources[k, j]
        # of a place x and y, over the table, and the block's yaw
        super().__init__(2 * len(self.every), turns, places, arrangements, self.count, 3)
        known = sorted(
            (name for block in names for name in block), key=len, reverse=True
        )  # "red moon" before "moon"
        self.any_name = re.compile(r"\b(" + "|".join(known) + r")\b")
        self.which = {name: (b, i) for b, block in enumerate(names) for i, name in enumerate(block)}

    def turned(self) -> Symmetries:
        if self.within is None:
            return self
        arrangements = ARRANGEMENTS if self.two_named else 1
        return TabletopSymmetries(
            self.names, self.permute, self.within, self.two_named, TURNS, PLACES, arrangements
        )

    def __call__(
        self, g: np.ndarray, obs: dict[str, Tensor], action: Tensor | None, goals: list[str]
    ) -> tuple[dict[str, Tensor], Tensor | None, list[str]]:
        if self.turns > 1:
            g = np.where(self.may_turn(g, obs["state"], goals), g, g % self.unturned)
        obs, action, goals = super().__call__(g, obs, action, goals)
        if self.arrangements > 1 and obs["state"].ndim == 3:
            obs = {"state": self.rearranged(g, obs["state"], goals)}
        return obs, action, goals

    def rearranged(self, g: np.ndarray, state: Tensor, goals: list[str]) -> Tensor:
        """States float (B, 1 + blocks, 4) of "push A to B", the other blocks where each element's arrangement has them.

        A demonstrator does not mind a block that blocks no way: of the tool, and of its target, to behind A, and of A to B, all
        straight. To block is to lie within CLEAR of it. So each of the others that blocks nothing goes, in turn, to the first
        of its TRIES places that blocks nothing either, and is farther than GAP from every block; if there is none, it stays.
        It is a counterfactual demonstration (Pitis et al. 2020). In about one tuple of a hundred the demonstrator was on a
        detour, not on a straight way, and would have gone round the new place.
        """
        _, _, arrangement = self.numbered(g)
        found = [[self.which[name][0] for name in self.any_name.findall(goal)] for goal in goals]
        is_pair = torch.tensor([len(blocks) == 2 for blocks in found])
        pair = torch.tensor([blocks if len(blocks) == 2 else [0, 1] for blocks in found])  # (B, 2): A, B
        device, state = state.device, state.cpu()
        tool = state[:, 0, :2]
        places = tool[:, None] + state[:, 1:, :2]  # (B, blocks, 2)
        a, b = places.take_along_dim(pair[..., None], 1).unbind(1)  # (B, 2) each
        behind = a - BEHIND * torch.nn.functional.normalize(b - a, dim=1)
        ways = ((tool, behind), (tool + state[:, 0, 2:], behind), (a, b))
        may_move = torch.ones(places.shape[:2], dtype=torch.bool).scatter(1, pair, False)
        may_move &= (is_pair & (arrangement > 0))[:, None] & clear(places, ways)  # (B, blocks)
        low, high = torch.from_numpy(self.within).float()
        drawn = torch.from_numpy(self.layouts[arrangement.numpy()]).float()  # (B, blocks, TRIES, 3)
        spots = low + (high - low) * drawn[..., :2]
        free = clear(spots.flatten(1, 2), ways).unflatten(1, (self.count, TRIES))
        moved, chosen = first_that_fits(places, spots, free, may_move, GAP)
        chosen = chosen[..., None, None]
        there = spots.take_along_dim(chosen, 2)[:, :, 0] - tool[:, None]  # (B, blocks, 2)
        yaw = 2 * np.pi * drawn[..., 2:].take_along_dim(chosen, 2)[:, :, 0]  # (B, blocks, 1)
        blocks = torch.where(moved[..., None], torch.cat([there, yaw.cos(), yaw.sin()], 2), state[:, 1:])
        return torch.cat([state[:, :1], blocks], 1).to(device)

    def may_turn(self, g: np.ndarray, state: Tensor, goals: list[str]) -> np.ndarray:
        """bool (B,): whether a turned tuple is as true, and fits on the table."""
        low, high = self.room(self.about_the_middle(g, state))
        undirected = [DIRECTED.search(goal) is None for goal in goals]
        return (low <= high).all(1).numpy() & undirected

    def room(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """How far each scene, of one moment or two, may be moved [dm]: the least and the greatest, float (B, 2) each."""
        tool = state[..., :1, :2]
        everything = torch.cat([tool, tool + state[..., :1, 2:], tool + state[..., 1:, :2]], -2)
        everything = everything.flatten(1, -2).cpu()  # (B, places of things, 2)
        low, high = torch.from_numpy(self.within).float()
        return low - everything.amin(1), high - everything.amax(1)

    def mirrored(self, g: np.ndarray, like: Tensor) -> Tensor:
        """bool (B, 1, ...), as many dimensions as `like` has."""
        mirrored = g // len(self.every) % 2 == 1
        return torch.from_numpy(mirrored).view(-1, *[1] * (like.ndim - 1)).to(like.device)

    def turn(self, g: np.ndarray, vectors: Tensor) -> Tensor:
        """Vectors float (B, ..., 2) of the plane, each turned by its element's angle."""
        if self.turns == 1:
            return vectors
        turn, _, _ = self.numbered(g)
        return rotated(turn.double() * (2 * np.pi / self.turns), vectors)

    def state(self, g: np.ndarray, state: Tensor) -> Tensor:
        """(B, ..., 1 + blocks, 4): of the tool x, y, target x, y; of each block x, y, cos and sin of its yaw.

        Only the tool's place is absolute; the others are relative to the tool.
        """
        state = self.about_the_middle(g, state)
        if self.places == 1:
            return state
        _, place, _ = self.numbered(g)
        shift = self.shift(*self.room(state), place)
        shift[torch.from_numpy(g < self.unturned)] = 0.0  # neither turned nor moved
        state = state.clone()
        state[..., 0, :2] += shift.view(-1, *[1] * (state.ndim - 3), 2).to(state.device)
        return state

    def about_the_middle(self, g: np.ndarray, state: Tensor) -> Tensor:
        """States mirrored, renamed and turned, and not yet moved."""
        source = torch.from_numpy(self.sources[g % len(self.every)]) + 1
        rows = torch.cat([torch.zeros(len(g), 1, dtype=torch.long), source], 1)  # (B, 1 + blocks)
        rows = rows.view(-1, *[1] * (state.ndim - 3), self.count + 1, 1).to(state.device)
        state = torch.take_along_dim(state, rows, -2)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], device=state.device)
        state = torch.where(self.mirrored(g, state), state * signs, state)
        return self.turn(g, state.unflatten(-1, (2, 2))).flatten(-2)

    def images(self, g: np.ndarray, images: Tensor) -> Tensor:
        """(B, 2, H, W, 3): y points right."""
        return torch.where(self.mirrored(g, images), images.flip(3), images)

    def action(self, g: np.ndarray, action: Tensor) -> Tensor:
        action = torch.where(self.mirrored(g, action), action * torch.tensor([1.0, -1.0]), action)
        return self.turn(g, action)

    def words(self, k: int, text: str) -> str:
        mirrored, permutation = divmod(k % self.unturned, len(self.every))
        becomes = np.argsort(self.sources[permutation])

        def other(match: re.Match) -> str:
            block, i = self.which[match[0]]
            return self.names[becomes[block]][i]

        text = self.any_name.sub(other, text)
        if mirrored:
            text = re.sub(r"\b(left|right)\b", lambda m: "right" if m[0] == "left" else "left", text)
        return text


def clear(points: Tensor, ways: tuple) -> Tensor:
    """Points float (B, K, 2) farther than CLEAR from every straight way, from and to float (B, 2) each: bool (B, K)."""
    free = torch.ones(points.shape[:2], dtype=torch.bool)
    for begin, end in ways:
        rel, way = points - begin[:, None], (end - begin)[:, None]  # (B, K, 2), (B, 1, 2)
        along = (rel * way).sum(2, keepdim=True) / (way * way).sum(2, keepdim=True).clamp(min=1e-9)
        free &= (rel - along.clamp(0, 1) * way).norm(dim=2) > CLEAR
    return free


class AlohaSymmetries(Symmetries):
    """The scene mirrored in the upright plane through both arms' bases, y = 0.5 m: each arm and object stays on its side."""

    order = 2
    # an arm's waist, forearm roll and wrist rotate turn the other way; a pose's y changes its sign, and so do the
    # rotations about x and z
    JOINTS = torch.tensor([-1.0, 1, 1, -1, 1, -1, 1])
    POSE = torch.tensor([1.0, -1, 1, 1, -1, 1, -1])
    STATE = torch.stack([JOINTS] * 2 + [POSE] * 5)  # (7, 7)

    def signs(self, g: np.ndarray, signs: Tensor, like: Tensor) -> Tensor:
        turned = torch.from_numpy(g == 1).view(-1, *[1] * (like.ndim - 1))
        return torch.where(turned, signs, 1.0).to(like.device)

    def state(self, g: np.ndarray, state: Tensor) -> Tensor:
        """(B, ..., 7, 7): two arms, then five poses."""
        return state * self.signs(g, self.STATE, state)

    def action(self, g: np.ndarray, action: Tensor) -> Tensor:
        """(B, 70): five targets of two arms."""
        return action * self.signs(g, self.JOINTS.repeat(10), action)

    def words(self, k: int, text: str) -> str:
        return text
