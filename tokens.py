"""Numbers and words as tokens: actions, steps to go, prompts (Section 3.1, Appendix A)."""

from __future__ import annotations

import tokenizers
import torch
from torch import Tensor

N_LOC = 1024  # number tokens in PaliGemma's vocabulary
QUESTION_ACTION = "What robot action to {}"  # Question_action(g), Section 3.1
QUESTION_STEPS = "How many steps to {}"  # Question_steps_to_go(g), Section 3.1
# asked of the first and the last observation; Section 3.1 gives no wording
QUESTION_INSTRUCTION = "What instruction was performed"


# --- numbers as tokens (Appendix A) -----------------------------------------------------------------------
class UniformBins:
    """Each dimension in `bins` equal bins over [low, high], one token each (Aloha: 256, Appendix A.2)."""

    def __init__(self, bins: int, low: float | list[float], high: float | list[float], dims: int):
        self.bins = bins
        self.dims = dims
        self.low = torch.as_tensor(low, dtype=torch.float32).expand(dims)
        self.high = torch.as_tensor(high, dtype=torch.float32).expand(dims)
        self.ranges = [(0, bins)] * dims  # number tokens allowed at each position: [first, last + 1)

    def encode(self, action: Tensor) -> Tensor:
        """float (..., dims) -> long (..., dims); values outside [low, high] go to the outermost bins."""
        unit = (action - self.low) / (self.high - self.low)
        return (unit * self.bins).floor().long().clamp(0, self.bins - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """long (..., dims) -> float (..., dims), the centres of the bins."""
        return self.low + (tokens + 0.5) / self.bins * (self.high - self.low)


class SignMagnitude:
    """Each dimension as a sign and a magnitude 0-10, two tokens (LanguageTable, Appendix A.1). Zero is +0."""

    PLUS = 11  # the sign tokens follow the eleven magnitudes: 11 is +, 12 is -

    def __init__(self, limit: float, dims: int):
        self.limit = limit
        self.dims = dims
        self.ranges = [(self.PLUS, self.PLUS + 2), (0, 11)] * dims

    def encode(self, action: Tensor) -> Tensor:
        """float (..., dims) in [-limit, limit] -> long (..., 2 dims)."""
        magnitude = (action.abs() / self.limit * 10).round().clamp(max=10).long()
        negative = (action < 0) & (magnitude > 0)
        sign = self.PLUS + negative.long()
        return torch.stack([sign, magnitude], -1).flatten(-2)

    def decode(self, tokens: Tensor) -> Tensor:
        """long (..., 2 dims) -> float (..., dims)."""
        sign, magnitude = tokens.unflatten(-1, (self.dims, 2)).unbind(-1)
        return torch.where(sign == self.PLUS, 1.0, -1.0) * magnitude / 10 * self.limit


def action_tokenizer(kind: str, **settings) -> UniformBins | SignMagnitude:
    """The tokeniser a domain asks for: kind "uniform" or "sign-magnitude" (`envs/*.py`, `action_tokens`)."""
    return {"uniform": UniformBins, "sign-magnitude": SignMagnitude}[kind](**settings)


class StepsToGo:
    """Steps to go up to `cap` in `bins` equal bins, one token; a bin's value is its left edge: d can be 0."""

    def __init__(self, cap: int, bins: int):
        self.width = cap / bins
        self.ranges = [(0, bins)]
        self.edges = torch.arange(bins) * self.width  # (K,)

    def encode(self, steps: Tensor) -> Tensor:
        """long (...) -> long (..., 1)."""
        return (steps / self.width).long().clamp(max=len(self.edges) - 1)[..., None]


# --- words as tokens --------------------------------------------------------------------------------------
class Tokenizer:
    """Texts to ids, by a `tokenizers` tokenizer that has <pad>, <bos>, <eos> and the number tokens in order.

    Raises ValueError if it lacks one of these.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("<pad>")
        self.bos = tokenizer.token_to_id("<bos>")
        self.eos = tokenizer.token_to_id("<eos>")
        self.loc = tokenizer.token_to_id("<loc0000>")  # the first number token
        self.known = {}  # prompt -> ids: the same few are asked again and again
        complete = None not in (self.pad, self.bos, self.eos, self.loc)
        if not complete or tokenizer.token_to_id("<loc1023>") != self.loc + N_LOC - 1:
            raise ValueError("the tokenizer lacks <pad>, <bos>, <eos> or the number tokens from <loc0000> on")

    @classmethod
    def train(cls, texts: list[str] | tuple[str, ...]) -> Tokenizer:
        """A word-level tokenizer on a domain's instructions: the vocabulary of the nano models."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
        marks = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\n,]"), "isolated")
        spaces = tokenizers.pre_tokenizers.Split(" ", "removed")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([marks, spaces])
        # the two questions are one token each: short prompts, fast nano models
        questions = [q.removesuffix(" {}") for q in (QUESTION_ACTION, QUESTION_STEPS)]
        numbers = [f"<loc{i:04d}>" for i in range(N_LOC)]
        special = ["<pad>", "<bos>", "<eos>", "<unk>", *questions, *numbers]
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=special, vocab_size=10**6)
        tokenizer.train_from_iterator([text + "\n" for text in texts], trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompts(self, texts: list[str], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """ids long (B, T), valid bool (B, T): padded on the left, so that a prompt's newline comes last."""
        rows = []
        for text in texts:
            if text not in self.known:
                self.known[text] = [self.bos, *self.encode(text + "\n")]
            rows.append(self.known[text])
        longest = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=device)
        return ids, ids != self.pad

    def answers(self, texts: list[str], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """ids long (B, L), valid bool (B, L): ended by <eos>, then padded, where no earlier token sees it."""
        rows = [[*self.encode(text), self.eos] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows], device=device)
        return ids, ids != self.pad

    def text(self, ids: list[int]) -> str:
        """An answer's ids up to <eos> -> its text."""
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        return self.tokenizer.decode(ids, skip_special_tokens=False).replace(" ,", ",")
