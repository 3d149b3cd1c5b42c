"""The two tasks of claims.py. Each gives what all runs of a seed share: a start, training data and held-out prompts.

Sums       A number, and sums that make it; a Llama of two layers. The task of examples/arithmetic_task.py: right and
           wrong answers are made by rule. The start has had a short phase of next-token training.
Additions  A two-digit number plus a digit, in the chat template; SmolLM2-135M-Instruct. The task of
           examples/smollm2/additions.py: answers are the start's own samples, and a rule says which are right. The
           upper sixth of the layers trains, by an adapter. What is below never changes and is computed once a seed,
           which makes a step several times as cheap; a prompt is computed once for its answers.

A prompt has some right answers, then as many wrong ones: a column is the place of an answer. What is measured at the
end of a run has the same names in both tasks.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from torch import Tensor, nn

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "smollm2"))

import transformers
from additions import LENGTH, Task, lora, start  # type: ignore[import-not-found]  # of examples, and so is what follows
from arithmetic_task import (  # type: ignore[import-not-found]
    NUMBERS,
    answer_logps,
    answers_of,
    encode,
    is_right,
    make_data,
    make_model,
    right_answer,
)
from arithmetic_training import HeldOut, warm_up  # type: ignore[import-not-found]
from peft import get_peft_model

from groupdpo_kernels import PreferenceGroups, linear_logps, seq_logps
from groupdpo_kernels.files import write_json
from groupdpo_kernels.stepwise import reward_accuracy

Logps = tuple[Tensor, Tensor]  # token_logps (T,), cu_seqlens (S+1,)
Rows = list[dict[str, Any]]


class Start(Protocol):
    """What all runs of a seed share."""

    @property
    def model(self) -> nn.Module:
        """To be copied, not trained."""

    @property
    def ref_logps(self) -> Tensor:  # (prompts, 2 SIDE)
        """The start's sums."""

    @property
    def watched_logps(self) -> Tensor:  # (S,)
        """The start's sums of what is watched."""

    def logps(
        self,
        model: nn.Module,
        prompts: Tensor,  # (p,)
        columns: Tensor,  # (p or 1, c)
    ) -> Logps:
        """Those of p c training answers, in this order."""

    def sums(self, model: nn.Module) -> Tensor:  # (prompts, 2 SIDE)
        """Those of all training answers, without a graph."""

    def watched(self, model: nn.Module) -> Logps:
        """Those of a few held-out pairs, right then wrong, on which gradients are measured."""

    def figures(self, model: nn.Module) -> dict[str, float]:
        """right, accuracy and right_logp, on held-out prompts."""


# -------------------------------------------------------------------------------------------------------- small: sums

SIDE, WARM_UP = 8, 120  # answers of a side; steps to the start


@dataclass(frozen=True)
class Answers:
    """Of each prompt SIDE right answers, then SIDE wrong ones."""

    input_ids: Tensor  # (prompts, 2 SIDE, L)
    targets: Tensor  # (prompts, 2 SIDE, L)

    @classmethod
    def make(cls, numbers: list[int], rng: random.Random) -> Answers:
        texts = []
        for number in numbers:
            others = [other for other in numbers if other != number]
            sums = [number] * SIDE + [rng.choice(others) for _ in range(SIDE)]
            texts += [f"{number}={right_answer(total, rng)}" for total in sums]
        ids = encode(texts).view(len(numbers), 2 * SIDE, -1)
        targets = ids[..., 1:].clone()
        targets[..., :3] = -100
        return cls(ids[..., :-1], targets)

    def logps(self, model: nn.Module, prompts: Tensor, columns: Tensor) -> Logps:
        at = (prompts[:, None], columns)
        logps: Logps = answer_logps(model, (self.input_ids[at].flatten(0, 1), self.targets[at].flatten(0, 1)))
        return logps


@dataclass(frozen=True)
class Sums:
    model: Any
    data: Answers
    ref_logps: Tensor  # (prompts, 2 SIDE)
    held_out: HeldOut
    numbers: list[int]  # of held-out prompts
    fixed: Answers  # held-out answers
    watched_logps: Tensor

    @classmethod
    def make(cls, seed: int, held_out: int, quick: bool) -> Sums:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        numbers = rng.sample(NUMBERS, len(NUMBERS))
        others, training = numbers[:held_out], numbers[held_out : held_out + 16 if quick else None]
        model = make_model()
        warm_up(model, make_data(training, training, rng), 2 if quick else WARM_UP)
        data = Answers.make(training, rng)
        measured = HeldOut(make_data(others, others, rng), model)
        fixed = Answers.make(others[:8], rng)
        with torch.no_grad():
            watched = seq_logps(*pairs_of(fixed, model))
        return cls(model, data, sums_of(data, model), measured, others, fixed, watched)

    def logps(self, model: nn.Module, prompts: Tensor, columns: Tensor) -> Logps:
        return self.data.logps(model, prompts, columns)

    def sums(self, model: nn.Module) -> Tensor:
        return sums_of(self.data, model)

    def watched(self, model: nn.Module) -> Logps:
        return pairs_of(self.fixed, model)

    def figures(self, model: Any) -> dict[str, float]:
        found = dict(self.held_out(model))
        texts = answers_of(model, self.numbers)
        return found | {"right": sum(map(is_right, self.numbers, texts)) / len(texts)}


def pairs_of(data: Answers, model: nn.Module) -> Logps:
    columns = torch.stack([torch.arange(SIDE), SIDE + torch.arange(SIDE)], -1).flatten()[None]
    return data.logps(model, torch.arange(len(data.targets)), columns)


@torch.no_grad()
def sums_of(data: Answers, model: nn.Module) -> Tensor:  # (prompts, 2 SIDE)
    parts, columns = torch.arange(len(data.targets)).split(32), torch.arange(2 * SIDE)[None]
    return torch.cat([seq_logps(*data.logps(model, part, columns)) for part in parts]).view(-1, 2 * SIDE)


# ------------------------------------------------------------------------------------------------------ real: additions

# Answers of a side, drawn of a prompt at temperature 1; prompts to train on, and to watch gradients on.
FEW, SAMPLES, PROMPTS, WATCHED = 4, 16, 24, 4


@dataclass(frozen=True)
class Trees:
    """Prompts, each in one row with all of its answers behind it: an answer sees the prompt and itself."""

    prompt: int  # P, tokens of every prompt
    answers: Tensor  # (n, c, m) token ids, -100 behind the end of an answer
    states: Tensor  # (n, P + c m, D) what the layers below the trained ones make of them

    @classmethod
    @torch.no_grad()
    def make(cls, below: nn.Module, prompts: Tensor, answers: Tensor) -> Trees:
        P, (_, c, m) = prompts.shape[1], answers.shape
        rows = torch.cat([prompts, answers.clamp(min=0).flatten(1)], 1)
        states = [below(part, **see(P, c, m)).last_hidden_state for part in rows.split(8)]
        return cls(P, answers, torch.cat(states))

    def hidden(
        self,
        model: Any,
        prompts: Tensor,  # (p,)
        columns: Tensor,  # (p or 1, c)
    ) -> Tensor:  # (p, c, m + 1, D)
        """Of each place that predicts a token of an answer, and of the one behind it."""
        P, m, (p, c) = self.prompt, self.answers.shape[2], (len(prompts), columns.shape[1])
        behind = (P + columns[..., None] * m + torch.arange(m)).flatten(1).expand(p, c * m)
        places = torch.cat([torch.arange(P).expand(p, P), behind], 1)
        states = self.states[prompts[:, None], places]
        out = model.get_base_model().model(inputs_embeds=states, **see(P, c, m)).last_hidden_state
        return torch.cat([out[:, None, P - 1 : P].expand(p, c, 1, -1), out[:, P:].unflatten(1, (c, m))], 2)

    def logps(self, model: Any, prompts: Tensor, columns: Tensor) -> Logps:
        return self.logps_of(self.hidden(model, prompts, columns), model, prompts, columns)

    def logps_of(self, hidden: Tensor, model: Any, prompts: Tensor, columns: Tensor) -> Logps:
        targets = self.answers[prompts[:, None], columns]  # (p, c, m)
        live = targets >= 0
        offsets = nn.functional.pad(live.sum(-1).flatten().cumsum(0), (1, 0))
        return linear_logps(hidden[:, :, :-1][live], head_of(model), targets[live]), offsets

    @torch.no_grad()
    def sums(self, model: Any) -> Tensor:  # (n, c)
        n, c, _ = self.answers.shape
        parts = torch.arange(n).split(8)
        return torch.cat([seq_logps(*self.logps(model, part, torch.arange(c)[None])) for part in parts]).view(n, c)


def see(P: int, c: int, m: int) -> dict[str, Any]:
    """Inputs of a model for a row of Trees: what each place sees, and where it stands."""
    answer = torch.cat([torch.full((P,), -1), torch.arange(c).repeat_interleave(m)])
    mask = ((answer == answer[:, None]) | (answer == -1)).tril()
    places = torch.cat([torch.arange(P), P + torch.arange(m).repeat(c)])
    return {"attention_mask": mask[None, None], "position_ids": places[None], "use_cache": False}


def head_of(model: Any) -> Tensor:  # (V, D)
    weight: Tensor = model.get_output_embeddings().weight
    return weight


@dataclass(frozen=True)
class Additions:
    model: Any  # the upper layers, with an adapter, and the head: what is below never changes
    task: Task
    trees: Trees  # of training: FEW right answers, then FEW wrong ones
    ref_logps: Tensor  # (prompts, 2 FEW)
    held_out: Trees  # of each prompt the right number and a wrong one
    pair_logps: Tensor  # (held-out prompts, 2), of the start

    @classmethod
    def make(cls, seed: int, held_out: int, quick: bool, path: Path | None) -> Additions:
        transformers.logging.set_verbosity_error()
        model, task = start(path)
        training, others = task.rows(seed, held_out)
        count = PROMPTS // 4 if quick else PROMPTS
        kept = path and path / f"answers-{seed}-{held_out}-{FEW}-{SAMPLES}-{count}.json"  # a minute's work
        if kept and kept.exists():
            asked, answers = json.loads(kept.read_text())
        else:
            torch.manual_seed(seed)
            asked, answers = drawn(model, task, training, count)
            if kept:
                write_json(kept, [asked, answers])
        rng = random.Random(seed)
        pairs = [pair(task, row["answer"], rng) for row in others]
        upper = copy.deepcopy(model)
        layers = max(1, len(model.model.layers) // 6)
        upper.model.layers = upper.model.layers[-layers:]
        below = model.model
        below.layers, below.norm = below.layers[:-layers], nn.Identity()
        trees, watched = (
            Trees.make(below, tokens_of(task, rows), padded(of_rows))
            for rows, of_rows in ((asked, answers), (others, pairs))
        )
        torch.manual_seed(seed)  # the same adapter, whether answers are drawn or kept
        adapted = get_peft_model(upper, lora()).eval()  # begins as the model itself
        return cls(adapted, task, trees, trees.sums(adapted), watched, watched.sums(adapted))

    @property
    def watched_logps(self) -> Tensor:  # (2 WATCHED,)
        return self.pair_logps[:WATCHED].flatten()

    def logps(self, model: nn.Module, prompts: Tensor, columns: Tensor) -> Logps:
        return self.trees.logps(model, prompts, columns)

    def sums(self, model: nn.Module) -> Tensor:
        return self.trees.sums(model)

    def watched(self, model: nn.Module) -> Logps:
        return self.held_out.logps(model, torch.arange(WATCHED), torch.arange(2)[None])

    @torch.no_grad()
    def figures(self, model: Any) -> dict[str, float]:
        """An answer by greedy decoding is right if it begins as the right number does, and that number ends there."""
        targets, columns = self.held_out.answers[:, 0], torch.arange(2)[None]
        lengths = (targets >= 0).sum(1)
        right, sums = [], []
        for part in torch.arange(len(targets)).split(8):
            hidden = self.held_out.hidden(model, part, columns)
            sums.append(seq_logps(*self.held_out.logps_of(hidden, model, part, columns)).view(-1, 2))
            best = (hidden[:, 0] @ head_of(model).T).argmax(-1)  # (p, m + 1)
            right += [self.is_right(*row) for row in zip(best, targets[part], lengths[part].tolist())]
        logps = torch.cat(sums)
        accuracy, _ = reward_accuracy((logps - self.pair_logps).flatten(), PreferenceGroups.pairs(len(logps)))
        return {
            "right": sum(right) / len(right),
            "accuracy": float(accuracy.mean()),
            "right_logp": float((logps[:, 0] / lengths).mean()),
        }

    def is_right(
        self,
        best: Tensor,  # (m + 1,) the most probable token at each place of the right number and behind it
        target: Tensor,  # (m,)
        length: int,  # of the right number
    ) -> bool:
        ends = not self.task.tokenizer.decode(best[length])[:1].isdigit()
        return torch.equal(best[:length], target[:length]) and ends


def tokens_of(task: Task, rows: Rows) -> Tensor:  # (rows, P)
    tokens: Tensor = task.tokenizer([row["prompt"] for row in rows], return_tensors="pt").input_ids  # equally long
    return tokens


def padded(answers: list[list[list[int]]]) -> Tensor:  # (n, c, m)
    flat = nn.utils.rnn.pad_sequence([torch.tensor(x) for of_row in answers for x in of_row], True, -100)
    return flat.unflatten(0, (len(answers), -1))


@torch.no_grad()
def sampled(model: Any, task: Task, rows: Rows) -> Tensor:  # (rows, SAMPLES, LENGTH)
    """Answers to each prompt at temperature 1, which is computed once for them."""
    out = model(tokens_of(task, rows), use_cache=True, logits_to_keep=1)
    out.past_key_values.batch_repeat_interleave(SAMPLES)
    drawn = [torch.multinomial(out.logits[:, -1].softmax(-1), SAMPLES, replacement=True).view(-1, 1)]
    while len(drawn) < LENGTH:
        out = model(drawn[-1], past_key_values=out.past_key_values, use_cache=True)
        drawn.append(torch.multinomial(out.logits[:, -1].softmax(-1), 1))
    return torch.cat(drawn, 1).view(len(rows), SAMPLES, LENGTH)


def drawn(model: Any, task: Task, rows: Rows, count: int) -> tuple[Rows, list[list[list[int]]]]:
    """So many rows, the first that have FEW right and FEW wrong answers among SAMPLES, and these answers."""
    asked: Rows = []
    answers = []
    for at in range(0, len(rows), 16):
        some = rows[at : at + 16]
        for row, of_row in zip(some, sampled(model, task, some).tolist()):
            if len(asked) < count and (sides := two_sides(task, row["answer"], of_row)):
                asked.append(row)
                answers.append(sides)
        if len(asked) == count:
            return asked, answers
    raise ValueError(f"rows must hold {count} prompts with {FEW} right and {FEW} wrong answers; got {len(asked)}")


def two_sides(task: Task, answer: int, answers: list[list[int]]) -> list[list[int]]:
    """The first FEW right answers, then the first FEW wrong ones, each up to its end; nothing if there are fewer."""
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    end = task.tokenizer.eos_token_id
    for tokens in answers:
        tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        sides[not task.is_right(task.tokenizer.decode(tokens, skip_special_tokens=True), answer)].append(tokens)
    return sides[0][:FEW] + sides[1][:FEW] if min(map(len, sides)) >= FEW else []


def pair(task: Task, answer: int, rng: random.Random) -> list[list[int]]:
    """The right number and a wrong one near it, with as many digits."""
    texts = [f" {answer}"]
    while len(texts) < 2:
        other = f" {answer + rng.randint(-9, 9)}"
        if len(other) == len(texts[0]) and not task.is_right(other, answer):
            texts.append(other)
    return [task.tokenizer(text).input_ids for text in texts]
