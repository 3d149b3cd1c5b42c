"""The task of this folder: a two-digit number plus a digit, in the model's chat template; a rule says what is right.

The assistant's turn begins with the sum, `47 + 8 =`, so that a few tokens hold the answer. An answer is right if the
first number in it is: ` 55.` and ` 55, which is odd` are. SmolLM2-135M-Instruct begins with a sixth of its samples
right; without the sum in its own turn, with next to none.

Held-out sums never occur in training. In the quick form the model is tiny and random, so it need only tell odd from
even.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LENGTH = 6  # tokens of an answer at most: a space, three digits, a full stop and the end of the turn
SYMBOLS = ["<pad>", "</s>", *"0123456789 +="]  # of the tiny model
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}  # options of every trainer here


@dataclass(frozen=True)
class Task:
    """What is asked, and who is right."""

    tokenizer: Any
    modulus: int | None = None  # an answer with the right remainder is right; None asks for the number itself

    def rows(self, seed: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(training, held-out) rows of prompt and answer. Only the order of the former depends on the seed."""
        sums = [(a, b) for a in range(10, 100) for b in range(1, 10)]
        random.Random(0).shuffle(sums)
        training, others = sums[held_out:], sums[:held_out]
        random.Random(seed).shuffle(training)
        return [*map(self._row, training)], [*map(self._row, others)]

    def _row(self, numbers: tuple[int, int]) -> dict[str, Any]:
        a, b = numbers
        turns = [("system", "You are a calculator."), ("user", f"{a} + {b} ="), ("assistant", f"{a} + {b} =")]
        chat = [{"role": role, "content": text} for role, text in turns]
        prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        return {"prompt": prompt, "answer": a + b}

    def is_right(self, text: str, answer: int) -> bool:
        numbers = re.findall(r"\d+", text)
        if not numbers:
            return False
        off = int(numbers[0]) - answer
        return off == 0 if self.modulus is None else off % self.modulus == 0

    def reward(self, completions: list[str], answer: list[int], **columns: Any) -> list[float]:
        """For OnlineGroupDPOTrainer: one for a right answer, else nothing."""
        return [float(self.is_right(text, right)) for text, right in zip(completions, answer)]

    @torch.no_grad()
    def answers(self, model: Any, prompts: list[str], samples: int | None = None, at_once: int = 128) -> list[str]:
        """The model's own answers by greedy decoding, or so many samples to each prompt in turn."""
        model.eval()
        found: list[str] = []
        sampling = {"do_sample": False} if samples is None else {"do_sample": True, "num_return_sequences": samples}
        for start in range(0, len(prompts), at_once):
            ids = self.tokenizer(
                prompts[start : start + at_once], return_tensors="pt", padding=True, padding_side="left"
            )
            whole = model.generate(
                input_ids=ids.input_ids,
                attention_mask=ids.attention_mask,
                max_new_tokens=LENGTH,
                pad_token_id=self.tokenizer.pad_token_id,
                top_k=0,
                **sampling,
            )
            found += self.tokenizer.batch_decode(whole[:, ids.input_ids.shape[1] :], skip_special_tokens=True)
        return found

    def accuracy(self, model: Any, rows: list[dict[str, Any]]) -> float:
        texts = self.answers(model, [row["prompt"] for row in rows])
        return sum(self.is_right(text, row["answer"]) for text, row in zip(texts, rows)) / len(rows)


def start(checkpoint: Path | None) -> tuple[Any, Task]:
    """The model that training begins with, and its task; without a checkpoint a tiny random one, and a task for it."""
    if checkpoint is None:
        return tiny_model(), Task(tiny_tokenizer(), modulus=2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, Task(AutoTokenizer.from_pretrained(checkpoint))


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ids: dict[str, Any] = {"vocab_size": len(SYMBOLS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, max_position_embeddings=256, **sizes, **ids))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character. Its chat is the last turn alone."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template="{{ messages[-1]['content'] }}",
    )
