"""Attention in two parts, to a shared prompt and to a row's own tokens: against softmax over both, and in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BASE, VOCAB, make
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groupdpo_kernels import Objective, forward_parts, group_backward, preference_loss
from groupdpo_kernels.data.batches import PreferenceBatch, TokenGroup, collate
from groupdpo_kernels.models import SharedPromptForward, attach, prompt_attention

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
SHAPES = {  # B, heads, heads of keys, L, P, width
    "a few rows": (3, 4, 2, 5, 7, 8),
    "one row": (1, 4, 4, 6, 3, 16),
    "one token of a prompt": (2, 6, 2, 4, 1, 8),
    "one token of a row": (4, 2, 1, 1, 9, 8),
    "blocks": (2, 2, 2, 130, 600, 8),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """query, own keys and values, those of the prompt; in memory as projections leave them."""
    B, heads, H, L, P, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, L, heads, width), *[(B, L, H, width)] * 2, *[(1, P, H, width)] * 2]
    return [torch.randn(*size, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype) for size in sizes]


def two_parts(*inputs: Tensor) -> Tensor:
    return prompt_attention._TwoParts.apply(*inputs, 0.3)


def joined(inputs: list[Tensor], sdpa: bool) -> Tensor:  # (B, L, heads, width)
    """Softmax over the prompt's keys and the row's own, in one."""
    query, k, v, pk, pv = inputs
    B, heads, L, _ = query.shape
    keys, values = (torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
    keys, values = (x.repeat_interleave(heads // k.shape[1], 1) for x in (keys, values))
    seen = torch.ones(L, keys.shape[2], dtype=torch.bool).tril(pk.shape[2])
    if sdpa:
        output = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=0.3)
    else:
        scores = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
        output = scores.softmax(-1) @ values
    return output.transpose(1, 2)


def results(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient of each input under a random upstream."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_parts_are_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """At most twice the error of torch's own attention at the same precision, in L2 norm: the largest of a tensor's
    errors differs by more than that between processors."""
    inputs = drawn(shape, dtype)
    truth = results(lambda x: joined(x, sdpa=False), [x.double() for x in inputs])
    found, peer = results(lambda x: two_parts(*x), inputs), results(lambda x: joined(x, sdpa=True), inputs)
    for ours, theirs, true in zip(found, peer, truth, strict=True):
        assert ours.shape == true.shape and ours.dtype == dtype
        off, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert off <= max(2 * allowed, 8 * torch.finfo(dtype).eps)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**BASE | options)).double().train()


def group(p: int = 9, sizes: tuple[int, ...] = (4, 6, 2, 5), seed: int = 0) -> TokenGroup:
    generator = torch.Generator().manual_seed(seed)
    prompt, *rest = (torch.randint(10, VOCAB, (n,), generator=generator).int() for n in (p, *sizes))
    return TokenGroup(prompt, rest, [i % 2 == 0 for i in range(len(rest))], 0)


def gradients(model: nn.Module, step: PreferenceBatch, **options: Any) -> list[Tensor]:
    """seq_logps, and the gradients of all parameters."""
    model.zero_grad()
    ref_logps = torch.linspace(-20, -10, step.groups.num_sequences, dtype=torch.float64)
    found = group_backward(step.parts, SharedPromptForward(model), step.groups, MPO, ref_logps, **options)
    return [found.seq_logps, *(p.grad for p in model.parameters())]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for what models of float64 round to float32: rotary tables, norms."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    largest = max(float(x.abs().max()) for x in expected[1:])
    for x, y in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6 * largest)


class Counting:
    """Calls of a function, which runs as it is."""

    def __init__(self, real: Any) -> None:
        self.real, self.count = real, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.real(*args, **kwargs)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """How often attention has run in two parts."""
    counting = Counting(prompt_attention._TwoParts.apply)
    monkeypatch.setattr(prompt_attention._TwoParts, "apply", counting)
    return counting


LAYERS = BASE["num_hidden_layers"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_model(taken: Counting, checkpointing: bool) -> None:
    """Each forward of rows, in both passes, and again in the backward where layers are checkpointed."""
    model = llama()
    whole = gradients(model, collate([group()], max_sequences=2))
    assert taken.count == 0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    table = ALL_ATTENTION_FUNCTIONS["sdpa"]
    check_same(gradients(model, collate([group()], max_sequences=2, share_prompt=True)), whole)
    assert taken.count == (6 if checkpointing else 4) * LAYERS and ALL_ATTENTION_FUNCTIONS["sdpa"] is table


def test_what_goes_the_other_way(taken: Counting) -> None:
    """Several prompts, dropout, a window, a cap of scores, another attention: as one softmax, and right."""
    several = [group(9, (4, 3)), group(8, (2, 5), seed=1)]
    window = {"sliding_window": 4, "layer_types": ["sliding_attention"] * LAYERS}
    for model, groups in (
        (llama(), several),
        (llama(attn_implementation="eager"), [group()]),
        (make("gemma2").double(), [group()]),
        (make("qwen3", use_sliding_window=True, **window).double(), [group()]),
    ):
        check_same(gradients(model, collate(groups, share_prompt=True)), gradients(model, collate(groups)))
    step = collate([group()], share_prompt=True)
    gradients(llama(attention_dropout=0.1), step)
    assert taken.count == 0
    gradients(llama(attention_dropout=0.1).eval(), step)
    assert taken.count == 2 * LAYERS


def test_an_error_leaves_the_attention_of_transformers() -> None:
    model, step = llama(), collate([group()], share_prompt=True)
    part, score, table = step.parts[0], attach(model), ALL_ATTENTION_FUNCTIONS["sdpa"]
    prefix = score.prefix(part.prompt.input_ids, **part.prompt.inputs)
    mb = part.micro_batches[0]
    with pytest.raises(ValueError, match="prefix must be of this model"):
        score(mb.input_ids, mb.targets, prefix=[x[:, :1] for x in prefix], **mb.inputs)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is table


def test_no_row_keeps_the_prompt() -> None:
    """What the graph of rows holds does not grow by a prompt's keys and values for each of them."""
    model = llama()

    def kept(rows: int, p: int) -> int:
        step = collate([group(p, (4,) * rows)], share_prompt=True)
        part, forward = step.parts[0], SharedPromptForward(model)
        prefix = forward.prefix(part.prompt)
        held: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = forward.rows(part.micro_batches[0], prefix)
        assert result[0].requires_grad
        return sum(held.values())

    assert kept(8, 50) - kept(8, 20) == kept(2, 50) - kept(2, 20) > 0


# ------------------------------------------------------------------------------------------- the only prompt runs once


class CountingForward(SharedPromptForward):
    """Counts prompts that run, with a graph and without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen: list[bool] = []

    def prefix(self, prompts: Any) -> Any:
        self.seen.append(torch.is_grad_enabled())
        return super().prefix(prompts)


@pytest.mark.parametrize(
    "groups, options, seen",
    [
        ([group()], {}, [True]),
        ([group(9, (4, 3)), group(8, (2, 5), seed=1)], {}, [False, False, True, True]),
        ([group(9, (4, 3)), group(8, (2, 5), seed=1)], {"max_sequences": 4}, [True]),  # their prompts run together
        ([group(), group(1)], {}, [False, True]),  # the second group has no prompt to share
    ],
    ids=["one group", "two groups", "two groups in one part", "one of two"],
)
def test_the_only_prompt_runs_once(groups: list[TokenGroup], options: dict[str, int], seen: list[bool]) -> None:
    """Where a step has another part, the prompt's graph would be in the way of that part's."""
    model = llama()
    step, forward = collate(groups, **{"max_sequences": 2, **options}, share_prompt=True), CountingForward(model)
    ref_logps = torch.zeros(step.groups.num_sequences, dtype=torch.float64)
    group_backward(step.parts, forward, step.groups, MPO, ref_logps)
    assert forward.seen == seen


def test_randomness_of_a_prompt_that_runs_once() -> None:
    """With dropout the gradient is that of one graph over the same draws, and the random state ends where that does."""
    model = make("gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.0).double()
    step = collate([group()], max_sequences=2, share_prompt=True)
    torch.manual_seed(5)
    found = gradients(model, step)
    after = torch.rand(3)
    model.zero_grad()
    torch.manual_seed(5)
    token_logps, cu_seqlens, _ = forward_parts(step.parts, SharedPromptForward(model))
    ref_logps = torch.linspace(-20, -10, step.groups.num_sequences, dtype=torch.float64)
    preference_loss(token_logps, cu_seqlens, step.groups, MPO, ref_logps).loss.backward()
    check_same(found[1:], [p.grad for p in model.parameters()])
    assert torch.equal(after, torch.rand(3))


def test_a_step_without_gradients_says_so() -> None:
    step = collate([group()], share_prompt=True)
    with torch.no_grad(), pytest.raises(ValueError, match="forward must give token_logps that require grad"):
        gradients(llama(), step)
