"""Any training loop: groups of right and wrong answers, no trainer. A tiny Llama, a few seconds on a CPU.

    python examples/plain_pytorch.py

Two things are this package's: `model_logps`, log-probabilities without logits, and `group_backward`, which fills .grad
a micro-batch at a time. With memory to spare, `preference_loss(...).loss.backward()` on all answers does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl_task import make_groups, make_model, make_tokenizer  # type: ignore[import-not-found]

from groupdpo_kernels import Objective, group_backward, model_logps, seq_logps
from groupdpo_kernels.data import collate, read_groups, tokenize_groups


def main(steps: int = 60) -> list[float]:
    model, objective = make_model(), Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
    groups = list(tokenize_groups(read_groups(make_groups()[0]), make_tokenizer()))  # 80 prompts, 2 to 6 answers each
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []

    def forward(mb: Any) -> tuple[Tensor, Tensor]:  # log-probabilities of answer tokens, and where answers begin
        return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs)), mb.cu_seqlens

    with torch.no_grad():  # the reference is the model as it is now: scored once, then no second model is held
        reference = [torch.cat([seq_logps(*forward(mb)) for mb in collate([group]).micro_batches]) for group in groups]
    for step in range(steps):
        chosen = [8 * step % 80 + i for i in range(8)]
        batch = collate([groups[i] for i in chosen], max_sequences=16)
        ref_logps = torch.cat([reference[i] for i in chosen])
        result = group_backward(batch.micro_batches, forward, batch.groups, objective, ref_logps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:2}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
