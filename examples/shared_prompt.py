"""A group's prompt, once: a module of one's own in plain PyTorch, no transformers. A second on a CPU.

    python examples/shared_prompt.py

`group_backward` runs a SharedPrompt through two methods. `prefix` gives all that responses read of their prompt, here
the keys and values of each layer; `rows` scores responses after them. The gradient is that of whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupdpo_kernels import Objective, group_backward, linear_logps
from groupdpo_kernels.data import TokenGroup, collate


class Layer(nn.Module):
    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = heads, nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:  # x (b, n, D)
        (b, n, D), qkv = x.shape, self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (b, heads, n, D / heads) each
        if past:  # of one prompt: expanded over the rows
            k, v = (torch.cat([p.expand(b, -1, -1, -1), new], 2) for p, new in zip(past, (k, v)))
        causal = torch.ones(n, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - n)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, D))
        return x + self.mlp(x), k, v


class Decoder(nn.Module):
    def __init__(self, V: int = 97, D: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(V, D), nn.Embedding(512, D), nn.Linear(D, V, bias=False)
        self.layers = nn.ModuleList(Layer(D, heads) for _ in range(layers))

    def forward(self, ids: Tensor, past: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        begin = past[0].shape[2] if past else 0
        x, kept = self.tokens(ids) + self.positions.weight[begin : begin + ids.shape[1]], []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, past[2 * i : 2 * i + 2])
            kept += [k, v]
        return x, tuple(kept)


class Forward:
    """What group_backward needs of it."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def prefix(self, prompt: Any) -> tuple[Tensor, ...]:  # keys and values of the prompt without its last token
        return self.model(prompt.input_ids)[1]

    def rows(self, mb: Any, prefix: Any = ()) -> tuple[Tensor, Tensor]:
        hidden, _ = self.model(mb.input_ids, prefix)
        return mb.live(linear_logps(hidden, self.model.head.weight, mb.targets)), mb.cu_seqlens


def main() -> tuple[float, int, int]:
    torch.manual_seed(0)
    model, objective = Decoder().double(), Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
    groups = [
        TokenGroup(torch.randint(97, (p,)), [torch.randint(97, (n,)) for n in sizes], [True, False, True, False], row)
        for row, (p, sizes) in enumerate([(120, (20, 9, 30, 14)), (75, (8, 8, 21, 3))])
    ]
    found = {}
    for share in (False, True):
        step = collate(groups, max_sequences=2, share_prompt=share, prompts_together=False)
        ref_logps = torch.full((step.groups.num_sequences,), -80.0, dtype=torch.float64)
        model.zero_grad()
        loss = group_backward(step.parts, Forward(model), step.groups, objective, ref_logps).loss
        found[share] = (
            step.computed_tokens,
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        )
        print(f"{'shared' if share else 'whole sequences':15}: loss {loss:.6f}, {step.computed_tokens} tokens computed")
    (whole_tokens, whole), (tokens, shared) = found[False], found[True]
    apart = float((shared - whole).abs().max() / whole.abs().max())
    print(f"the gradients differ by {apart:.0e} of the largest entry")
    return apart, tokens, whole_tokens


if __name__ == "__main__":
    main()
