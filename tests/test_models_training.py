"""model_logps inside a training step: precisions, checkpointing, dropout, compiled models, auxiliary losses."""

from __future__ import annotations

import pytest
import torch
from test_models import ours
from tiny_models import batch, check_budget, check_model, eager_logps, from_logits, make, score
from torch import Tensor, nn

from groupdpo_kernels import attach, model_logps


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi", "mixtral"])
def test_bfloat16_model(name: str) -> None:
    check_model(make(name).bfloat16(), ours, batch(B=4, L=40))


def autocast(logps, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def run(model: nn.Module, **inputs: object) -> Tensor:
        with torch.autocast("cpu", dtype):
            return logps(model, **inputs)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, inputs = make(name), batch(B=4, L=40)
    found, eager = score(model, autocast(ours, dtype), inputs), score(model, autocast(eager_logps, dtype), inputs)
    truth = score(model, eager_logps, inputs)  # float32 is exact beside 16 bits
    assert found[0].dtype == torch.float32
    check_budget(found, eager, truth, torch.finfo(dtype).eps)


def test_autocast_is_as_near_to_the_product_in_16_bits_as_linear_logps_is() -> None:
    """Logits are not rounded to 16 bits, as an eager head under autocast would."""
    model, inputs = make("llama"), batch(B=4, L=40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, eager = ours(model, **inputs), eager_logps(model, **inputs)
        hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0].bfloat16().double()
    truth = from_logits(hidden @ model.lm_head.weight.bfloat16().double().T, inputs["targets"])
    assert (found - truth).abs().max() < 1e-5 < 1e-3 < (eager - truth).abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = make("llama"), batch()
    plain = score(model, ours, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpoints run only under backward(), and only where an input wants a gradient.
        model.enable_input_require_grads()
        token_logps = ours(model, **inputs)
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(token_logps.shape, generator=generator, dtype=torch.float64).float()
        (token_logps * upstream).sum().backward()
        found = (token_logps.detach(), {n: p.grad for n, p in model.named_parameters()})
    else:
        found = score(model, ours, inputs)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)


def test_dropout_follows_the_random_state() -> None:
    model, inputs = make("gpt2", embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2), batch()
    ours(model, **inputs)  # the probe comes before, or with, the same draws: test_models.py
    states = []
    for logps in (ours, eager_logps):
        torch.manual_seed(3)
        states.append((logps(model, **inputs), torch.get_rng_state()))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(states[0][1], states[1][1])
    assert (ours(model, **inputs) - states[0][0]).abs().max() > 1e-3


def test_no_grad_and_inference_mode() -> None:
    model, inputs = make("cohere").eval(), batch()
    with torch.inference_mode():
        expected = eager_logps(model, **inputs)
        torch.testing.assert_close(ours(model, **inputs), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        found = ours(model, **inputs)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [True, False], ids=["trained_head", "frozen_head"])
def test_frozen_parts(head: bool) -> None:
    model, inputs = make("llama", tie_word_embeddings=False), batch()
    model.lm_head.requires_grad_(head)
    model.model.requires_grad_(not head)
    check_model(model, ours, inputs)


def test_auxiliary_loss_of_a_mixture_of_experts() -> None:
    model, inputs = make("mixtral"), batch()
    targets = inputs.pop("targets")
    scored = attach(model, strict=True)

    def total(token_logps: Tensor, aux_loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(token_logps.sum() + 5 * aux_loss, list(model.parameters()), allow_unused=True))

    token_logps, outputs = scored.with_outputs(targets=targets, **inputs, output_router_logits=True)
    expected = model(**inputs, output_router_logits=True)
    assert outputs.logits is None and outputs["logits"] is None
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    found = total(token_logps, outputs.aux_loss)
    reference = total(from_logits(expected.logits, targets), expected.aux_loss)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    without = total(scored(targets=targets, **inputs), torch.zeros(()))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, without) if a is not None and b is not None)


@pytest.fixture
def fresh_compiler():  # type: ignore[no-untyped-def]
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["function", "in_place", "forward"])
def test_a_compiled_model_runs_eagerly(how: str) -> None:
    model, inputs = make("llama"), batch()
    expected = score(model, ours, inputs)
    compiled: nn.Module = model
    if how == "function":
        compiled = torch.compile(model, backend="eager")
    elif how == "in_place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    found = score(model, lambda _, **x: ours(compiled, **x), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    if how == "in_place":  # one of the three, for time: the compiled model still gives its logits
        torch.testing.assert_close(eager_logps(compiled, **inputs), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_layers_compiled_by_themselves_stay_compiled() -> None:
    model, inputs = make("llama"), batch()
    expected = score(model, ours, inputs)
    graphs = []

    def backend(graph, _example):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    torch.testing.assert_close(score(model, ours, inputs), expected, rtol=1e-6, atol=1e-7)
    assert graphs


def test_accumulated_gradients_over_micro_batches_of_one_model() -> None:
    model, inputs = make("qwen3"), batch(B=4, L=20)
    scored = attach(model, strict=True)
    scored(**inputs).sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        scored(**{k: v[rows] for k, v in inputs.items()}).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[n], rtol=1e-4, atol=1e-5)


def test_workspace_and_impl_reach_a_trained_model() -> None:
    model, inputs = make("llama"), batch()
    tight = score(model, lambda m, **x: model_logps(m, **x, workspace_bytes=2**12, impl="reference"), inputs)
    wide = score(model, ours, inputs)
    torch.testing.assert_close(tight, wide, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- on a GPU


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.cuda() for k, v in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check_model(make(name).cuda().to(dtype), ours, on_gpu(batch(B=4, L=40)))


@pytest.mark.gpu
def test_gpu_memory_stays_below_the_logits() -> None:
    model = make("llama", vocab_size=128000, max_position_embeddings=2048).cuda().bfloat16()
    ids = torch.randint(3, 128000, (4, 2048), device="cuda")
    ours(model, ids, ids)  # the probe, and whatever is compiled
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(model, ids, ids).sum().backward()
    logits = 4 * 2048 * 128000 * 2
    assert torch.cuda.max_memory_allocated() - before < logits / 4


@pytest.mark.gpu
def test_targets_may_stay_on_the_host() -> None:
    model, inputs = make("llama").cuda(), batch()
    expected = ours(model, **on_gpu(inputs))
    device_inputs = on_gpu({k: v for k, v in inputs.items() if k != "targets"})
    torch.cuda.synchronize()
    found = ours(model, **device_inputs, targets=inputs["targets"])
    assert found.is_cuda
    torch.testing.assert_close(found, expected)
