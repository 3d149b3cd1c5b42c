"""A task that a tiny Llama learns in seconds, as rows of a preference data set, for the examples with a trainer.

A prompt is a number, `47:`. An answer of three digits is right if they are odd or even as the number is: `135`.
Held-out numbers never occur in training, and only their last digit tells right from wrong.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS = ["<pad>", "</s>", *"0123456789:"]
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "constant",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids: dict[str, Any] = {"vocab_size": len(SYMBOLS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=16))


def make_groups(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) rows of prompt, positives and negatives: 1 to 3 of each."""
    rng = random.Random(seed)
    rows = []
    for number in range(100):
        right, wrong = ("13579", "02468") if number % 2 else ("02468", "13579")
        sides = [sorted({"".join(rng.choices(side, k=3)) for _ in range(rng.randint(1, 3))}) for side in (right, wrong)]
        rows.append({"prompt": f"{number}:", "positives": sides[0], "negatives": sides[1]})
    rng.shuffle(rows)
    return rows[:80], rows[80:]


def as_pairs(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Columns prompt, chosen and rejected: the first answer of each side."""
    return {
        "prompt": [group["prompt"] for group in groups],
        "chosen": [group["positives"][0] for group in groups],
        "rejected": [group["negatives"][0] for group in groups],
    }
