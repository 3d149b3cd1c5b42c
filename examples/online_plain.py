"""Online groups in a loop of your own: generate, reward, split into sides, take a step. No trainer.

    python examples/online_plain.py
    python examples/online_plain.py --model NAME    # any causal LM, as `from_pretrained` loads it

The reward is the share of odd digits among the characters of a completion. A tiny Llama learns it from nothing in a few
seconds on a CPU. Completions of one prompt with the same reward have no two sides: such a group is left out. The loss
here has no reference model; `ref_logps` of `group_backward` is where its log-probabilities go.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_task import make_model, make_tokenizer  # type: ignore[import-not-found]

from groupdpo_kernels import Objective, group_backward, model_logps
from groupdpo_kernels.data import TokenGroup, best_vs_rest, collate

PROMPTS, G, LENGTH = ["12:", "47:", "80:", "95:"], 8, 4


def reward(text: str) -> float:
    return sum(character in "13579" for character in text) / max(1, len(text))


def main(steps: int = 40, name: str | None = None, lr: float = 3e-3) -> list[float]:
    model: Any = make_model() if name is None else AutoModelForCausalLM.from_pretrained(name)
    tokenizer: Any = make_tokenizer() if name is None else AutoTokenizer.from_pretrained(name)
    objective = Objective("mpo", beta=2.0, reference_free=True, average=True, nll_weight=1.0)
    rule, optimizer, means = best_vs_rest(), torch.optim.AdamW(model.parameters(), lr=lr), []
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def forward(mb: Any) -> tuple[Tensor, Tensor]:  # log-probabilities of response tokens, and where responses begin
        return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs)), mb.cu_seqlens

    for step in range(steps):
        groups, rewards = [], []
        for row, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt, return_tensors="pt").to(model.device)
            sampling = {"do_sample": True, "num_return_sequences": G, "max_new_tokens": LENGTH, "pad_token_id": pad}
            whole = model.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, **sampling)
            completions = []
            for tokens in whole[:, ids.input_ids.shape[1] :].int().cpu():  # up to its first end of text, and with it
                ends = (tokens == tokenizer.eos_token_id).nonzero().flatten().tolist()
                completions.append(tokens[: ends[0] + 1] if ends else tokens)
            scores = [reward(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in completions]
            rewards += scores
            picked = rule(scores)
            if len({side for _, side in picked}) == 2:
                chosen, sides = [completions[i] for i, _ in picked], [side for _, side in picked]
                groups.append(TokenGroup(ids.input_ids[0].int().cpu(), chosen, sides, row))
        means.append(sum(rewards) / len(rewards))
        if groups:
            batch = collate(groups, max_sequences=16).to(model.device)
            group_backward(batch.micro_batches, forward, batch.groups, objective)
            optimizer.step()
            optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2}: mean reward {means[-1]:.3f}, {len(groups)} of {len(PROMPTS)} groups have two sides")
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Online groups in a loop of your own")
    parser.add_argument("--model", help="a folder or a hub name; by default a tiny Llama from nothing")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=3e-3, help="3e-3 is for the tiny Llama; a real model wants 1e-6")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.model, arguments.lr)
