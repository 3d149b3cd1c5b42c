"""Tokens a second of one step on a group, with its prompt computed once and with it computed for every answer.

A step is `group_backward` in two passes on a small Llama, at one size of group after the other. The rate counts the
tokens of whole sequences either way, so it compares times: a step with a shared prompt computes fewer of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from groupdpo_kernels import Objective, group_backward
from groupdpo_kernels.data import TokenGroup, collate
from groupdpo_kernels.models import SharedPromptForward

OBJECTIVE = Objective("mpo", beta=5.0, average=True, nll_weight=1.0)
VOCABULARY = 2048


@dataclass(frozen=True)
class Size:
    group: int  # G, answers to the prompt
    prompt: int = 192  # tokens
    answer: int = 32

    @property
    def tokens(self) -> int:
        return self.group * (self.prompt + self.answer)


def draw(size: Size) -> TokenGroup:
    prompt = torch.randint(VOCABULARY, (size.prompt,))
    answers = [torch.randint(VOCABULARY, (size.answer,)) for _ in range(size.group)]
    return TokenGroup(prompt, answers, [i < size.group // 2 for i in range(size.group)], 0)


def measure(sizes: list[Size], rounds: int) -> Iterator[tuple[Size, float, float]]:
    """(size, tokens a second with whole sequences, and with a shared prompt), each at the best of its rounds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    forward = SharedPromptForward(model)
    for size in sizes:
        group, ref_logps = draw(size), torch.zeros(size.group)
        steps = [collate([group], max_sequences=8, share_prompt=share) for share in (False, True)]
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for step, taken in zip(steps, seconds):
                model.zero_grad()
                start = time.perf_counter()
                group_backward(step.parts, forward, step.groups, OBJECTIVE, ref_logps)
                taken.append(time.perf_counter() - start)
        whole, shared = (size.tokens / min(taken) for taken in seconds)
        yield size, whole, shared
