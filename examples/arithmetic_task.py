"""Groups of right and wrong sums, and a small Llama that learns them: the task of group_arithmetic.py.

A prompt is a number, `579=`, and a sum that makes it is a right answer: `123+456`. (The given answers add up without
carrying, which a model of this size learns in a minute.) Each prompt comes with a group of 8 answers, 2 to 6 of them
right. A wrong answer is a right answer of another prompt: nothing in an answer gives it away, only the prompt tells
the two apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from groupdpo_kernels import PreferenceGroups, model_logps, seq_logps

GROUP = 8  # answers to a prompt
ANSWER = 7  # characters of an answer
ALPHABET = "0123456789+="
NUMBERS = [100 * h + 10 * t + o for h in range(3, 10) for t in range(3, 10) for o in range(3, 10)]

Batch = tuple[Tensor, Tensor]  # input_ids (s, L), targets (s, L)


# ------------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Groups of GROUP rows, all of one length: a number of three digits, "=", and an answer.

    As `groupdpo_kernels.stepwise` wants its data: a length, items, and `select` for parts of it.
    """

    input_ids: Tensor  # (S, L)
    targets: Tensor  # (S, L) the token that each position predicts; -100 in the prompt
    positive: Tensor  # (S,) bool

    def __len__(self) -> int:
        return len(self.input_ids) // GROUP

    def __getitem__(self, group: int) -> Data:
        return self.select([group])

    def __iter__(self) -> Iterator[Data]:
        return map(self.__getitem__, range(len(self)))

    def select(self, groups: Iterable[int]) -> Data:
        rows = self.rows(torch.tensor([*groups]))
        return Data(self.input_ids[rows], self.targets[rows], self.positive[rows])

    @property
    def groups(self) -> PreferenceGroups:
        return PreferenceGroups(torch.arange(0, len(self.positive) + 1, GROUP), self.positive)

    def rows(self, groups: Tensor) -> Tensor:  # (g,) -> (g * GROUP,)
        return (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()

    def pairs(self, groups: Tensor) -> Tensor:  # (g,) -> (g * GROUP,)
        """Rows of GROUP / 2 pairs a group, right then wrong; the shorter side repeats."""
        positive = self.positive.view(-1, GROUP)[groups]
        right_first = torch.argsort(~positive, dim=1, stable=True)
        P, nth = positive.sum(1, keepdim=True), torch.arange(GROUP // 2)
        right, wrong = right_first.gather(1, nth % P), right_first.gather(1, P + nth % (GROUP - P))
        return (torch.stack([right, wrong], 2) + groups[:, None, None] * GROUP).flatten()

    def batches(self, rows: Tensor, size: int) -> list[Batch]:
        """These rows, in micro-batches of `size`."""
        return [(self.input_ids[chosen], self.targets[chosen]) for chosen in rows.split(size)]

    def under(self, prompts: list[int]) -> Data:
        """The same groups of answers, again from the first when they run out, each after another prompt."""
        swapped = self.select(i % len(self) for i in range(len(prompts)))
        before = encode([f"{prompt}=" for prompt in prompts]).repeat_interleave(GROUP, 0)
        ids = torch.cat([before, swapped.input_ids[:, before.shape[1] :]], 1)
        return Data(ids, swapped.targets, swapped.positive)


def right_answer(number: int, rng: random.Random) -> str:
    """Two numbers of three digits, zeros in front, that make `number` without carrying."""
    first = int("".join(str(rng.randint(0, int(digit))) for digit in str(number)))
    return f"{first:03d}+{number - first:03d}"


def is_right(number: int, answer: str) -> bool:
    first, plus, second = answer.partition("+")
    return plus == "+" and first.isdecimal() and second.isdecimal() and int(first) + int(second) == number


def make_data(prompts: list[int], numbers: list[int], rng: random.Random) -> Data:
    """One group for each prompt; the sums of wrong answers are drawn from `numbers`."""
    texts, positive = [], []
    for number in prompts:
        labels = [True] * rng.randint(2, GROUP - 2)
        labels += [False] * (GROUP - len(labels))
        rng.shuffle(labels)
        others = [other for other in numbers if other != number]
        for label in labels:
            answer = right_answer(number if label else rng.choice(others), rng)
            texts.append(f"{number}={answer}")
        positive += labels
    ids = encode(texts)
    targets = ids[:, 1:].clone()
    targets[:, :3] = -100
    return Data(ids[:, :-1], targets, torch.tensor(positive))


def encode(texts: list[str]) -> Tensor:  # (S, L)
    return torch.tensor([[ALPHABET.index(character) for character in text] for text in texts])


# ------------------------------------------------------------------------------------------------------------ the model


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(ALPHABET),
        max_position_embeddings=16,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def answer_logps(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(token_logps (t,), cu_seqlens (s+1,)) of the answers alone."""
    input_ids, targets = batch
    live = targets != -100
    return model_logps(model, input_ids, targets)[live], torch.nn.functional.pad(live.sum(1).cumsum(0), (1, 0))


@torch.no_grad()
def sums_of(model: torch.nn.Module, data: Data) -> Tensor:  # (S,)
    """Log-probabilities of the answers, no graph."""
    batches = data.batches(torch.arange(len(data.positive)), 512)
    return torch.cat([seq_logps(*answer_logps(model, batch)) for batch in batches])


@torch.no_grad()
def answers_of(model: LlamaForCausalLM, numbers: list[int]) -> list[str]:
    """Greedy decoding."""
    ids = encode([f"{number}=" for number in numbers])
    for _ in range(ANSWER):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    return ["".join(ALPHABET[i] for i in row[4:]) for row in ids.tolist()]
