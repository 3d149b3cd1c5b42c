"""Tiny random transformers models, batches for them, and the error budget of a model's log-probabilities."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

from groupdpo_kernels.models.head_call import LogitMap

VOCAB = 509
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MINICPM3 = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "scale_emb": 12,
    "dim_model_base": 16,
}
# name: (model class, config class, config, what the probe must find, why it is here)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], LogitMap, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", BASE, LogitMap(VOCAB), "the plain case, head untied"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", BASE | {"head_dim": 8}, LogitMap(VOCAB), "tied head by default"),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        BASE | {"head_dim": 8, "final_logit_softcapping": 3.0},
        LogitMap(VOCAB, softcap=3.0),
        "soft cap, tied",
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        BASE | {"head_dim": 8, "final_logit_softcapping": 50.0},
        LogitMap(VOCAB, softcap=50.0),
        "a soft cap that the logits hardly feel",
    ),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        BASE | {"logit_scale": 0.25},
        LogitMap(VOCAB, logit_scale=0.25),
        "logit_scale multiplies",
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        BASE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
        LogitMap(VOCAB, logit_scale=1 / 3),
        "logits_scaling divides",
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        BASE | MINICPM3,
        LogitMap(VOCAB),
        "scales the hidden state before the head",
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", BASE, LogitMap(VOCAB), "bias in the head"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        LogitMap(VOCAB),
        "tied head, older code",
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        BASE | {"num_hidden_layers": 3, "logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 16},
        LogitMap(VOCAB, softcap=3.0),
        "its soft cap has a name of its own; no attention in the first layers",
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        LogitMap(VOCAB),
        "mixture of experts",
    ),
}


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """An architecture of the table in training mode, spread so that its log-probabilities are far from uniform."""
    model_class, config_class, config, _, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config | changes))
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 4
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


def batch(B: int = 2, L: int = 13, prompt: int = 4, pad: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """input_ids, attention_mask and shifted targets: the prompt is not scored, the last row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 9, (B, L), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        ids[-1, -pad:], mask[-1, -pad:] = 0, 0
    targets = torch.full_like(ids, -100)
    targets[:, prompt - 1 : -1] = ids[:, prompt:].where(mask[:, prompt:] == 1, -100)
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def from_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """What a trainer writes: log_softmax of the model's logits in float32, gathered."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    picked = torch.log_softmax(wide / temperature, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, picked)


def eager_logps(
    model: nn.Module, input_ids: Tensor, targets: Tensor, temperature: float = 1.0, **inputs: Any
) -> Tensor:
    return from_logits(model(input_ids=input_ids, **inputs).logits, targets, temperature)


Scored = tuple[Tensor, dict[str, Tensor | None]]


def score(model: nn.Module, logps: Callable[..., Tensor], inputs: dict[str, Any], seed: int = 7) -> Scored:
    """Log-probabilities and the gradients of all parameters under random, non-uniform upstream gradients."""
    token_logps = logps(model, **inputs)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(token_logps.shape, generator=generator, dtype=torch.float64).to(token_logps)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        return token_logps.detach(), {}
    gradients = torch.autograd.grad((token_logps * upstream).sum(), list(parameters.values()), allow_unused=True)
    return token_logps.detach(), dict(zip(parameters, gradients))


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def check_budget(ours: Scored, eager: Scored, truth: Scored, eps: float) -> None:
    """Each result within twice eager's error against float64, or 8 roundings where eager happens to be exact.

    Errors are L2 norms over a tensor. A gradient that is noise (attention keys at tiny sizes) is measured on the scale
    of the others: 1/100 of the root mean square of all.
    """
    values = {"token_logps": (ours[0], eager[0], truth[0])}
    assert ours[1].keys() == eager[1].keys() == truth[1].keys()
    present = [g for g in truth[1].values() if g is not None]
    for name in truth[1]:
        triple = (ours[1][name], eager[1][name], truth[1][name])
        assert len({g is None for g in triple}) == 1, f"{name}: only some of the gradients are None: {triple}"
        if triple[0] is not None:
            values[name] = triple
    typical = (
        torch.cat([g.flatten() for g in present]).double().square().mean().sqrt() if present else torch.tensor(0.0)
    )
    for name, (found, peer, exact) in values.items():
        assert found.shape == exact.shape, name
        scale = exact.double().norm() + (0.01 * typical * exact.numel() ** 0.5 if name != "token_logps" else 0)
        error, allowed = (found.double() - exact).norm(), (peer.double() - exact).norm()
        assert error <= torch.maximum(2 * allowed, 8 * eps * scale), (
            f"{name}: {error:.3e}; eager {allowed:.3e}, scale {scale:.3e}"
        )


def check_model(model: nn.Module, logps: Callable[..., Tensor], inputs: dict[str, Any], **eager_only: Any) -> None:
    """`logps(model, **inputs)` against the model's own logits, values and all gradients, with float64 as the truth."""
    dtype = next(model.parameters()).dtype
    wide = copy.deepcopy(model).double()  # first: RecurrentGemma keeps states of a forward, which cannot be copied
    ours = score(model, logps, inputs)
    assert ours[0].dtype == torch.float32 and not ours[0][inputs["targets"] == -100].any()
    eager = score(model, eager_logps, inputs | eager_only)
    truth = score(wide, eager_logps, widened(inputs) | eager_only)
    check_budget(ours, eager, truth, torch.finfo(dtype).eps)
