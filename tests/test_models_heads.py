"""The output head in its variants: LoRA and its kin, modules_to_save, custom and quantised heads, and the fallback."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_models import ours
from tiny_models import BASE, VOCAB, batch, check_budget, check_model, eager_logps, make, score, spread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import groupdpo_kernels.models.head_call
from groupdpo_kernels import attach, model_logps
from groupdpo_kernels.models.head_call import LogitMap, ScoreOptions, logps_in_chunks
from groupdpo_kernels.models.probe import fit_scale_and_cap


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the rows of each call of logps_in_chunks from the head, to tell which way a head went."""
    calls: list[int] = []
    real = groupdpo_kernels.models.head_call.logps_in_chunks

    def recorded(logits_of, x, *rest):  # type: ignore[no-untyped-def]
        calls.append(x.shape[0])
        return real(logits_of, x, *rest)

    monkeypatch.setattr(groupdpo_kernels.models.head_call, "logps_in_chunks", recorded)
    return calls


def with_lora(name: str = "llama", seed: int = 0, **config: object) -> nn.Module:
    """Adapters on a projection and on the head, away from their zero start."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"]} | config
    model = peft.get_peft_model(make(name, tie_word_embeddings=False), peft.LoraConfig(**options))
    return randomised(model, seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name and "magnitude" not in parameter_name:
                parameter.normal_(std=0.2)
    return model.train()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"r": 12, "lora_alpha": 3}], ids=["plain", "rs", "r12"])
def test_lora_on_the_head(config: dict[str, object], in_chunks: list[int]) -> None:
    check_model(with_lora(**config), ours, batch())
    assert not in_chunks


def test_lora_with_scale_cap_and_bias() -> None:
    check_model(with_lora("cohere"), ours, batch())
    check_model(with_lora("gemma2"), ours, batch())
    check_model(with_lora("phi", lora_bias=True, target_modules=["lm_head"]), ours, batch())


def test_several_lora_adapters() -> None:
    model = with_lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    check_model(randomised(model), ours, batch())


def test_float32_adapters_over_a_bfloat16_head(in_chunks: list[int]) -> None:
    base = make("llama", tie_word_embeddings=False).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    model = randomised(model)
    assert model.base_model.model.lm_head.lora_B["default"].weight.dtype == torch.float32
    check_model(model, ours, batch(B=4, L=40))
    assert not in_chunks


def test_lora_dropout_drops_what_peft_drops() -> None:
    model, inputs = with_lora(lora_dropout=0.3), batch()

    def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(model: nn.Module, **inputs: object) -> Tensor:
            torch.manual_seed(5)
            return function(model, **inputs)

        return run

    found, eager = score(model, seeded(ours), inputs), score(model, seeded(eager_logps), inputs)
    truth = score(copy.deepcopy(model).double(), seeded(eager_logps), inputs)
    check_budget(found, eager, truth, torch.finfo(torch.float32).eps)


def test_reference_under_disable_adapter_and_after_merging() -> None:
    model, inputs = with_lora(), batch()
    bare = attach(model, strict=True)
    with torch.no_grad():
        adapted = bare(**inputs)
        with model.disable_adapter():
            torch.testing.assert_close(bare(**inputs), eager_logps(model, **inputs), rtol=1e-5, atol=1e-5)
            assert (bare(**inputs) - adapted).abs().max() > 0.01
        model.merge_adapter()
        torch.testing.assert_close(bare(**inputs), adapted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():  # peft unmerges in the forward
            torch.testing.assert_close(bare(**inputs), eager_logps(model, **inputs), rtol=1e-5, atol=1e-5)


def test_dora_is_called_in_chunks(in_chunks: list[int]) -> None:
    model, inputs = with_lora(use_dora=True), batch()
    check_model(model, lambda m, **x: model_logps(m, **x, workspace_bytes=2**16, strict=True), inputs)
    assert in_chunks == [int((inputs["targets"] != -100).sum())]


def test_modules_to_save(in_chunks: list[int]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = randomised(peft.get_peft_model(make("llama"), config))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight *= 1.5
    check_model(model, ours, batch())
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(ours(model, **batch()), eager_logps(model, **batch()), rtol=1e-5, atol=1e-5)
    assert not in_chunks


class Int8Linear(nn.Module):
    """A head as a quantiser leaves it: integers and a scale a row, dequantised in its forward; (B, L, D) only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1) / 127)
        self.register_buffer("quantised", (weight / self.scale.detach()[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        _, _, D = x.shape
        assert self.quantised.shape[1] == D
        return x @ (self.quantised.to(x.dtype) * self.scale[:, None]).T


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_quantised_head(name: str, in_chunks: list[int]) -> None:
    model = make(name, tie_word_embeddings=False)
    model.lm_head = Int8Linear(model.lm_head)
    check_model(model, lambda m, **x: model_logps(m, **x, workspace_bytes=2**16, strict=True), batch())
    assert in_chunks


def test_a_subclass_or_override_with_its_own_forward_is_not_taken_for_linear(in_chunks: list[int]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make("llama")
    model.lm_head.__class__ = Doubled
    check_model(model, ours, batch())
    model = make("llama")
    weight = model.lm_head.weight
    model.lm_head.forward = lambda x: nn.functional.linear(x, 3 * weight)
    torch.testing.assert_close(ours(model, **batch()), eager_logps(model, **batch()), rtol=1e-5, atol=1e-5)
    assert len(in_chunks) == 2


def test_offloaded_head_is_read_inside_its_hook(in_chunks: list[int]) -> None:
    model, inputs = make("llama"), batch()
    with torch.no_grad():
        expected = eager_logps(model, **inputs)
        weights = {"weight": model.lm_head.weight.detach().clone()}
        add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", offload=True, weights_map=weights))
        assert model.lm_head.weight.device.type == "meta"
        torch.testing.assert_close(ours(model, **inputs), expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight.device.type == "meta" and not in_chunks


def test_parametrized_head() -> None:
    model = make("llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    check_model(model, ours, batch())


class Alive(TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_chunks_stay_within_the_workspace(softcap: float | None) -> None:
    V, workspace = 4000, 2**20
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(V, 8)
    targets = torch.randint(0, V, (256,))
    with Alive() as memory:
        logps = logps_in_chunks(
            lambda x: x @ weight.T, hidden, targets, LogitMap(V, 0.5, softcap), ScoreOptions(workspace_bytes=workspace)
        )
        logps.sum().backward()
    assert 0.3 * workspace < memory.peak < workspace


# ------------------------------------------------------------------------------------------------------- the fallback


def subclass(after: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A Llama that applies `after` to its logits."""

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            outputs = super().forward(*args, **kwargs)
            outputs.logits = after(self, outputs.logits)
            return outputs

    torch.manual_seed(0)
    model = Changed(transformers.LlamaConfig(**BASE))
    model.temper = nn.Parameter(torch.tensor(1.5))
    return spread(model)


def shifted() -> nn.Module:
    return subclass(lambda model, z: z + torch.linspace(0, 1, VOCAB, dtype=z.dtype))


def masked() -> nn.Module:  # Chameleon
    return subclass(lambda model, z: torch.where(torch.arange(VOCAB) % 7 == 0, torch.finfo(z.dtype).min, z))


def trained_scale() -> nn.Module:
    return subclass(lambda model, z: z * model.temper)


def by_position() -> nn.Module:
    return subclass(lambda model, z: z * torch.linspace(1, 2, z.shape[1], dtype=z.dtype)[:, None])


def not_called() -> nn.Module:
    model = make("llama")
    weight, model.lm_head = model.lm_head.weight, nn.Identity()
    head = nn.Linear(32, VOCAB, bias=False)
    head.weight = weight
    model.get_output_embeddings = lambda: head
    model.lm_head = Delegate(head)
    return model


class Delegate(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.head.weight)


def called_twice() -> nn.Module:
    return subclass(lambda model, z: z + 0 * model.lm_head(torch.zeros(1, 1, 32, dtype=z.dtype)))


def no_head() -> nn.Module:
    model = make("llama")
    model.get_output_embeddings = lambda: None
    return model


def hooked() -> nn.Module:
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    return model


class Mixing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(-2) if x.dim() == 3 else x)


def mixing() -> nn.Module:
    model = make("llama")
    model.lm_head.__class__ = Mixing
    return model


def asks_for_more() -> nn.Module:
    model = make("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args, kwargs: (args, {"scale": 2.0}), with_kwargs=True)
    model.lm_head.__class__ = Scaled
    return model


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


FALLBACKS = {
    shifted: "not a scale, a soft cap or a cut",
    masked: "not a scale, a soft cap or a cut",
    trained_scale: "a parameter acts on the logits",
    by_position: "depends on the position",
    not_called: "is not called",
    called_twice: "called 2 times",
    no_head: "gives no output head",
    hooked: "a forward hook on its output head changes the result",
    mixing: "does not score each position by itself",
    asks_for_more: r"more than the hidden states: \['scale'\]",
}


@pytest.mark.parametrize("build", FALLBACKS, ids=lambda f: f.__name__)
def test_fallback(build: Callable[[], nn.Module]) -> None:
    model, reason, inputs = build(), FALLBACKS[build], batch()
    with pytest.warns(UserWarning, match=f"needs its real logits: .*{reason}"):
        model_logps(model, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a model
        small = {"workspace_bytes": 2**15}
        found, eager = (
            score(model, lambda m, **x: model_logps(m, **x, **small), inputs),
            score(model, eager_logps, inputs),
        )
    for name in eager[1]:
        torch.testing.assert_close(found[1][name], eager[1][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], eager[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"{reason}.*strict=True forbids"):
        ours(model, **inputs)


def test_fallback_gives_temperature_and_checks_targets() -> None:
    model, inputs = masked(), batch()
    with pytest.warns(UserWarning):
        found = model_logps(model, **inputs, temperature=0.5)
    torch.testing.assert_close(found, eager_logps(model, **inputs, temperature=0.5), rtol=1e-5, atol=1e-5)
    inputs["targets"][0, 5] = VOCAB
    with pytest.raises(ValueError, match=rf"targets must be in \[0, V = {VOCAB}\) or ignore_index = -100; got {VOCAB}"):
        model_logps(model, **inputs)
    with pytest.raises(ValueError, match="positions of the logits"):
        model_logps(model, inputs["input_ids"], inputs["targets"][:, :5])


# ------------------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0625, 3.0])
@pytest.mark.parametrize("cap", [None, 0.5, 3.0, 30.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fit_recovers_scale_and_cap(scale: float, cap: float | None, dtype: torch.dtype) -> None:
    z = (torch.arange(1001, dtype=torch.float64) - 500) * 0.08
    y = z.to(dtype) * scale
    if cap is not None:
        y = cap * torch.tanh(y / cap)
    eps = torch.finfo(dtype).eps
    fitted = fit_scale_and_cap(y.double(), z, (4 if dtype == torch.bfloat16 else 16) * eps)
    assert fitted is not None
    found = fitted[0] * z if fitted[1] is None else fitted[1] * torch.tanh(fitted[0] * z / fitted[1])
    torch.testing.assert_close(found, y.double(), rtol=4 * eps, atol=1e-12 + eps * 0.1)
    if dtype == torch.float64:
        assert fitted[0] == pytest.approx(scale, rel=1e-12)
        assert fitted[1] == (None if cap is None else pytest.approx(cap, rel=1e-9))


@pytest.mark.parametrize(
    "f",
    [
        torch.sign,
        torch.square,
        torch.neg,
        torch.atan,
        torch.zeros_like,
        lambda z: z.log_softmax(0),
        lambda z: z / 0,
        lambda z: z.flip(0),
    ],
)
def test_fit_refuses_everything_else(f: Callable[[Tensor], Tensor]) -> None:
    z = (torch.arange(1001, dtype=torch.float64) - 500) * 0.08
    assert fit_scale_and_cap(f(z), z, 1e-6) is None
    assert fit_scale_and_cap(f(z), z, 0.03) is None
