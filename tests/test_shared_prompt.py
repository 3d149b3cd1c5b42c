"""A prompt that runs once for its responses: values and gradients are those of whole sequences, in every model that can
share, and the others say why they cannot."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from prompt_groups import InFloat64, check_same, coupled, groups_of, run
from test_model_layouts import LAYOUTS, build
from tiny_models import ARCHITECTURES, BASE, GPT2, VOCAB, check_budget, make, spread
from torch import Tensor, nn

from groupdpo_kernels import model_logps
from groupdpo_kernels.data import collate
from groupdpo_kernels.models import attach, why_not_left_padded, why_not_shared

HEADS = BASE | {"head_dim": 8}
WINDOW = {"sliding_window": 4}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
LATENT = EXPERTS | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"q_lora_rank": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1}
LLAMA4 = HEADS | EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "num_local_experts": 2}
LLAMA4 |= {"attention_chunk_size": 4, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3]}
TWO_KINDS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
GEMMA3N = HEADS | WINDOW | TWO_KINDS | PER_LAYER | {"intermediate_size": [48] * 4, "altup_num_inputs": 2}
GEMMA3N |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 4}
GPT_NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2, "num_heads": 4}
GPT_NEO |= {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 16}

# name: (model class, config class, config), beside those of tiny_models.py and test_model_layouts.py
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3 with a short window": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        HEADS | WINDOW | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", BASE | WINDOW),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", BASE | LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", BASE | LATENT | {"n_group": 1, "topk_group": 1}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        BASE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEADS | EXPERTS | {"num_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", BASE | EXPERTS | {"num_experts": 4}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon with alibi": ("FalconForCausalLM", "FalconConfig", SIZES | {"alibi": True}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"intermediate_size": 48}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", BASE),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", BASE),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", BASE | WINDOW),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", BASE | WINDOW),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", HEADS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", HEADS | WINDOW | EXPERTS | {"num_local_experts": 4}),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", HEADS | WINDOW | TWO_KINDS | PER_LAYER),
}


RECURRENT = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8}
RECURRENT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 8}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_n_groups": 1}
ZAMBA = {"mamba_d_state": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1}
ZAMBA |= {"chunk_size": 8, "attention_hidden_size": 64, "layers_block_type": ["mamba", "hybrid"]}

STATE, MIXED, NONE = "takes? the keys and values of a prompt", "off the whole sequence", "takes no cache"
# name: what is said of those that cannot share
REFUSED = {
    "recurrent_gemma": STATE,
    "mamba": STATE,
    "falcon_mamba": STATE,
    "jamba": STATE,
    "prophetnet": STATE,
    "qwen3_next": STATE,
    "lfm2": STATE,
    "falcon_h1": STATE,
    "zamba2": STATE,
    "bert encoder": MIXED,
    "roberta": MIXED,
    "rwkv": NONE,
    "openai": NONE,
    "bart": "BartForConditionalGeneration has an encoder",
}
MORE |= {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        HEADS | RECURRENT | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", BASE | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", BASE | STATE_SPACE | {"mamba_d_ssm": 32}),
    "zamba2": ("Zamba2ForCausalLM", "Zamba2Config", BASE | ZAMBA),
    "bert encoder": ("BertLMHeadModel", "BertConfig", SIZES | {"intermediate_size": 48}),
    "openai": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("ffn_dim", 48), ("attention_heads", 4))},
    ),
}


def model_of(name: str) -> nn.Module:
    if name in ARCHITECTURES:
        return make(name).eval()
    if name in LAYOUTS:
        return build(name)
    model_class, config_class, config = MORE[name]
    torch.manual_seed(0)
    return spread(getattr(transformers, model_class)(getattr(transformers, config_class)(**config))).eval()


# A window and a chunk of 4 tokens are shorter than most of these prompts, of which the last two run together. The first
# group takes two micro-batches of four rows, the second one shares nothing.
GROUPS = groups_of((12, [2, 6, 1, 3, 4]), (1, [3, 2]), (7, [3, 1]), (6, [4, 2]))
NAMES = [n for n in dict.fromkeys([*ARCHITECTURES, *LAYOUTS, *MORE]) if n not in REFUSED]


def in_float64(model: nn.Module) -> tuple[nn.Module, InFloat64]:
    """A copy of the model and its forward. What it makes of its logits is measured before, in its own precision."""
    wide = copy.deepcopy(model).double()
    ids = torch.arange(20, 28)[None]
    model_logps(wide, ids, ids)
    return wide, InFloat64(wide)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_whole_sequences(name: str) -> None:
    model = model_of(name)
    assert not why_not_shared(model) and not why_not_left_padded(model)
    wide, forward = in_float64(model)
    whole = coupled(wide, collate(GROUPS), forward)
    step = collate(GROUPS, max_sequences=4, share_prompt=True)
    assert [type(part).__name__ for part in step.parts] == ["SharedPrompt", "MicroBatch", "SharedPrompt"]
    check_same(run(wide, step, forward), whole)


# One of each kind of attention, of positions and of experts: all of NAMES pass, in a minute.
ROUNDING = [
    "llama",
    "gemma2",
    "phi",
    "gpt2",
    "mixtral",
    "bloom",
    "cohere2",
    "llama4",
    "deepseek_v3",
    "falcon with alibi",
]
ROUNDING += ["gpt_oss", "gemma4"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROUNDING)
def test_it_rounds_as_whole_sequences_do(name: str) -> None:
    model = model_of(name).bfloat16()
    wide, forward = in_float64(model)
    truth = coupled(wide, collate(GROUPS), forward)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        wholes = [run(model, collate(GROUPS, max_sequences=4)), coupled(model, collate(GROUPS))]
        shared = run(model, collate(GROUPS, max_sequences=4, share_prompt=True))
        check_budget(shared, worst(wholes, truth), truth, torch.finfo(dtype).eps)


Step = tuple[Tensor, dict[str, Tensor]]


def worst(steps: list[Step], truth: Step) -> Step:
    """Each tensor from the step that is furthest off: rounding differs with the micro-batches."""
    values = max((step[0] for step in steps), key=lambda x: (x.double() - truth[0]).norm())
    return values, {n: max((s[1][n] for s in steps), key=lambda x: (x.double() - truth[1][n]).norm()) for n in truth[1]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_those_that_cannot_share_say_why(name: str) -> None:
    model = model_of(name)
    why = why_not_shared(model)
    assert type(model).__name__ in why and re.search(REFUSED[name], why), why
    ids = torch.arange(20, 24)[None]
    with pytest.raises(ValueError, match="model must be one that can share a prompt; " + re.escape(why)):
        attach(model).prefix(ids)
    pair = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="prefix must be empty for a model that cannot share a prompt; "):
        model_logps(model, ids, ids, prefix=(pair, pair), position_ids=ids)
