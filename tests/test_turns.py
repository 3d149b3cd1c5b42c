"""Responses of several turns, with tools: how rows are read, which tokens are scored, what templates must do."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import make
from tiny_tokenizers import byte_level_bpe
from tiny_trl import COMMON, llama, run, steps

from groupdpo_kernels import Objective, forward_parts, preference_loss, seq_logps
from groupdpo_kernels.cli import scoring
from groupdpo_kernels.data import Group, Report, collate, merge_prompts, read_groups, tokenize_groups
from groupdpo_kernels.data.formats import Turns
from groupdpo_kernels.models import SharedPromptForward
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def asks(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls(city: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": city, **more}}}]}


def answers(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


ROW = {
    "prompt": [asks("Is it warm in Rome?")],
    "chosen": [calls("Rome"), answers("21 degrees"), says("It is.")],
    "rejected": [says("I guess so."), asks("Do not guess."), says("Then no.")],
    "tools": TOOLS,
}


def tokenizer_with(template: str) -> Any:
    """A tokenizer with Qwen's marks of turns, and one of the templates that TRL has."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def only_group(row: dict[str, Any]) -> Group:
    (group,) = read_groups([row], on_bad="error")
    return group


def dropped(rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> str:
    report = Report()
    groups = read_groups(rows, report=report)
    assert not list(groups if tokenizer is None else tokenize_groups(groups, tokenizer, report=report, **options))
    return str(report)


# --------------------------------------------------------------------------------------------------------- what is read


def test_messages_after_a_prompt_are_a_response() -> None:
    group = only_group(ROW)
    assert group.prompt == ROW["prompt"] and group.tools == TOOLS
    assert all(isinstance(text, Turns) for text in group.responses)
    assert group.responses[0].messages == [{**calls("Rome"), "content": ""}, *ROW["chosen"][1:]]
    assert str(group.responses[1]) == "I guess so.\nThen no."
    assert group.responses[1] != "I guess so.\nThen no."  # none equals a plain text
    assert pickle.loads(pickle.dumps(group)) == copy.deepcopy(group) == group
    assert only_group({**ROW, "tools": json.dumps(TOOLS)}).tools == TOOLS
    assert only_group({**ROW, "prompt": "Is it warm in Rome?"}).prompt == ROW["prompt"]
    plain = only_group({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "tools": TOOLS})
    assert plain.prompt == [asks("Hi?")] and plain.tools == TOOLS  # only a template can place them


def test_conversations_part_where_they_differ() -> None:
    """Without a prompt of their own: what all begin with, up to a turn of the assistant."""
    start = [asks("Hi."), says("Hello."), asks("Tea?")]
    row = {"chosen": [*start, says("Green."), asks("Why?"), says("So.")], "rejected": [*start, says("No.")]}
    group = only_group(row)
    assert group.prompt == start and [len(getattr(x, "messages", [x])) for x in group.responses] == [3, 1]
    early = only_group(
        {"chosen": [*start, says("Green.")], "rejected": [asks("Hi."), says("What?"), asks("Tea?"), says("No.")]}
    )
    assert early.prompt == [asks("Hi.")] and [len(x.messages) for x in early.responses] == [3, 3]
    inside = only_group({"chosen": [*start[:2]], "rejected": [*start, says("No.")]})
    assert inside.prompt == [asks("Hi.")] and inside.responses[0] == "Hello."
    last = only_group({"chosen": [*start, says("Green.")], "rejected": [*start, says("No.")]})
    assert last.prompt == start and last.responses == ["Green.", "No."]
    for other in ([asks("Who?"), says("No.")], [{"role": "system", "content": "S"}, *start, says("No.")]):
        assert "do not answer the same messages" in dropped([{"chosen": row["chosen"], "rejected": other}])


def test_empty_fields_of_a_table_are_none() -> None:
    """A table gives every call the arguments of all, and every message the fields of all."""
    other = {**ROW, "chosen": [calls("Oslo", unit="C"), answers("3"), says("No.")]}
    (first, second) = read_groups(Dataset.from_list([ROW, other]), on_bad="error")
    assert first.responses[0].messages == only_group(ROW).responses[0].messages
    assert second.responses[0].messages[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "unit": "C"}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["none", "null", "empty"])
def test_a_call_in_a_prompt_needs_no_content(content: dict[str, Any]) -> None:
    """As APIs and data sets write it."""
    prompt = [*ROW["prompt"], {**calls("Rome"), **content}, answers("21 degrees")]
    tokenizer = tokenizer_with("qwen2_5")
    last = {"chosen": [says("Yes.")], "rejected": [says("No.")]}
    for row in ({"prompt": prompt, **last}, {name: prompt + said for name, said in last.items()}):
        (group,) = tokenize_groups([only_group({**row, "tools": TOOLS})], tokenizer, on_bad="error")
        head = tokenizer.decode(group.prompt)
        assert '{"city": "Rome"}' in head and head.endswith("assistant\n")


def test_rows_are_merged_where_their_tools_are_the_same() -> None:
    more = {**ROW, "rejected": [says("No idea.")]}
    (merged,) = merge_prompts(read_groups([ROW, more]))
    assert len(merged.responses) == 3 and merged.tools == TOOLS
    assert len(list(merge_prompts(read_groups([ROW, {**more, "tools": None}])))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "weather"}, "tools must be a list of dicts, or JSON of one; got 'weather'"),
        ({"tools": ["weather"]}, r"tools must be a list of dicts, or JSON of one; got \['weather'\]"),
        ({"chosen": [calls("Rome"), answers("21")]}, "a response must begin and end with a message of the assistant"),
        ({"chosen": [says("A", tool_calls="weather")]}, "tool_calls must be a list of functions with names; got"),
        ({"chosen": [says("A", tool_calls=[{"id": 1}])]}, "tool_calls must be a list of functions with names; got"),
        (
            {"chosen": [says("A"), {"role": "tool", "text": "21"}, says("B")]},
            "must have a role and a content; got role, text",
        ),
        (
            {"chosen": [says("A"), {"role": "system", "content": "S"}, says("B")]},
            "of the assistant, tools and users; got",
        ),
        ({"chosen": [{"role": "assistant"}]}, "a message must have a role and a content; got role"),
        ({"chosen": [calls("\ud83d"), answers("x"), says("A")]}, "half of a surrogate pair"),
    ],
)
def test_bad_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_groups([{**ROW, **change}], on_bad="error"))


@pytest.mark.parametrize("name", ["completion", "response"])
def test_rows_of_one_side_are_refused_in_words(name: str) -> None:
    with pytest.raises(
        ValueError, match="label of one response, as KTO takes them, is a group with an empty side: put"
    ):
        list(read_groups([{"prompt": "Tea?", name: "Green.", "label": True}]))
    assert "without a negative response" in dropped([{"prompt": "Tea?", "positives": ["Green."], "negatives": []}])


# ------------------------------------------------------------------------------------------------------- what is scored


def scored_texts(tokenizer: Any, group: Any, i: int) -> tuple[str, str]:
    ids, own = group.responses[i], group.scored_of(i)
    return tokenizer.decode(ids[own]), tokenizer.decode(ids[~own])


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
RESULT = "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>"


def test_turns_of_the_assistant_are_scored_by_their_rendering() -> None:
    """Exactly what is sampled: from after the header of a turn to its end, without the line end that follows."""
    tokenizer = tokenizer_with("qwen2_5")
    (group,) = tokenize_groups([only_group(ROW)], tokenizer, on_bad="error")
    assert scored_texts(tokenizer, group, 0) == (
        f"{CALL}It is.<|im_end|>",
        f"\n{RESULT}\n<|im_start|>assistant\n",
    )
    assert scored_texts(tokenizer, group, 1) == (
        "I guess so.<|im_end|>Then no.<|im_end|>",
        "\n<|im_start|>user\nDo not guess.<|im_end|>\n<|im_start|>assistant\n",
    )
    conversation = [*ROW["prompt"], {**calls("Rome"), "content": ""}, *ROW["chosen"][1:]]
    whole = tokenizer.apply_chat_template(conversation, tools=TOOLS, tokenize=False)
    assert tokenizer.decode([*group.prompt, *group.responses[0]]) + "\n" == whole
    (all_of_it,) = tokenize_groups([only_group(ROW)], tokenizer, assistant_only=False)
    assert all_of_it.scored is None
    assert [*map(tokenizer.decode, all_of_it.responses)] == [*map(tokenizer.decode, group.responses)]


def test_turns_of_the_assistant_are_scored_by_the_templates_own_mask() -> None:
    """It marks the line ends around a turn too. Prompts are the same, and so are answers of one turn."""
    tokenizer = tokenizer_with("qwen2_5_training")
    (group,) = tokenize_groups([only_group(ROW)], tokenizer, on_bad="error")
    (apart,) = tokenize_groups([only_group(ROW)], tokenizer_with("qwen2_5"))
    assert torch.equal(group.prompt, apart.prompt)
    own, others = scored_texts(tokenizer, group, 0)
    assert own == f"{CALL}\n\nIt is.<|im_end|>" and others == f"{RESULT}\n<|im_start|>assistant"
    found = tokenizer.apply_chat_template(
        [*ROW["prompt"], *only_group(ROW).responses[0].messages], tools=TOOLS, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, mask = found["input_ids"], found["assistant_masks"]
    P, n = len(group.prompt), len(group.responses[0])
    assert ids[:P] == group.prompt.tolist() and ids[P : P + n] == group.responses[0].tolist()
    assert [bool(x) for x in mask[P : P + n]] == group.scored[0].tolist() and n == len(ids) - P - 1
    one = {**ROW, "chosen": [calls("Rome")], "rejected": [says("No.")]}
    for a, b in zip(
        *(next(tokenize_groups([only_group(one)], each)).responses for each in (tokenizer, tokenizer_with("qwen2_5")))
    ):
        assert torch.equal(a, b) and tokenizer.decode(a).endswith("<|im_end|>")


def test_what_a_template_must_be_able_to() -> None:
    """Qwen 3 renders the reasoning of a turn only until the user speaks again."""
    thinking = {
        "prompt": [asks("Tea?")],
        "chosen": [says("Green.", reasoning_content="Mild."), asks("Why?"), says("So.", reasoning_content="Well.")],
        "rejected": [says("No.")],
    }
    assert "leaves out reasoning_content, 'Mild.'" in dropped([thinking], tokenizer_with("qwen3"))
    unsaid = {**thinking, "chosen": [says("Green."), asks("Why?"), says("So.")]}
    text = dropped([unsaid], tokenizer_with("qwen3"))
    assert (
        "renders message 1 of the conversation otherwise alone than in the whole; a template with the keyword" in text
    )
    (group,) = tokenize_groups([only_group(unsaid)], tokenizer_with("qwen3_training"), on_bad="error")
    assert "Why?" in scored_texts(tokenizer_with("qwen3"), group, 0)[1]
    loop = {**thinking, "chosen": [{**calls("Rome"), "reasoning_content": "Ask."}, answers("21"), says("Warm.")]}
    (group,) = tokenize_groups([only_group(loop)], tokenizer_with("qwen3"), on_bad="error")  # no user in between
    assert "Ask." in scored_texts(tokenizer_with("qwen3"), group, 0)[0]


def test_what_a_template_leaves_out_is_named(bpe: Any) -> None:
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with("qwen2_5")
    tokenizer.chat_template = chatml
    assert "the chat template leaves out the tools of the row" in dropped([ROW], tokenizer)
    assert "the template leaves out the name in tool_calls, 'weather'" in dropped([{**ROW, "tools": None}], tokenizer)
    texts = json.loads(json.dumps(ROW["chosen"]))
    texts[0]["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'  # a template writes text in quotes again
    assert "the arguments in tool_calls" in dropped([{**ROW, "chosen": texts}], tokenizer_with("qwen2_5"))
    assert "several turns, which a chat template alone" in dropped([{**ROW, "tools": None}], bpe, chat=False)
    plain = {"prompt": "Is it warm?", "chosen": "Yes.", "rejected": "No.", "tools": TOOLS}
    assert "it has tools or images, which a chat template alone" in dropped([plain], bpe, chat=False)
    marked = tokenizer_with("qwen2_5")
    marked.chat_template = chatml.replace(
        "{{ m.content }}", "{% if m.name %}{% generation %}x{% endgeneration %}{% endif %}{{ m.content }}"
    )
    two = {"prompt": [asks("Tea?")], "chosen": [says("A"), asks("B"), says("C")], "rejected": [says("No.")]}
    assert "marks no token of the response as generated" in dropped([two], marked)


def test_what_a_tool_says_may_be_rendered_as_json() -> None:
    """Llama 3.1 writes it in quotes, so that its own quotes and line ends are escaped."""
    said = '{"degrees": 21,\n "sky": "blå"}'
    row = {**ROW, "chosen": [calls("Rome"), answers(said), says("It is.")], "rejected": [says("No.")]}
    tokenizer = tokenizer_with("llama3_1")
    (group,) = tokenize_groups([only_group(row)], tokenizer, on_bad="error")
    assert json.dumps(said, ensure_ascii=False) in tokenizer.decode(group.responses[0])
    lost = tokenizer_with("llama3_1")
    lost.chat_template = lost.chat_template.replace("message.content | tojson", "'' | tojson")
    assert lost.chat_template != tokenizer.chat_template
    assert "the template leaves out content" in dropped([row], lost)


# --------------------------------------------------------------------------------------------------- batches, a trainer

SETS = {
    "prompt": [asks("Is it warm in Rome?")],
    "positives": [ROW["chosen"], [says("It is warm.")]],
    "negatives": [
        ROW["rejected"],
        [says("No.")],
        [calls("Oslo"), answers("3"), calls("Rome"), answers("21"), says("So.")],
    ],
    "tools": TOOLS,
}


def model_for(tokenizer: Any) -> Any:
    model = make("llama").double()
    model.resize_token_embeddings(len(tokenizer))
    return model


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_loss_is_that_of_plain_logits(layout: str) -> None:
    """Sums and lengths over the scored tokens alone, in every layout, against a loop over whole sequences."""
    tokenizer = tokenizer_with("qwen2_5")
    groups = list(tokenize_groups(read_groups([SETS, {**SETS, "prompt": [asks("Warm?")]}]), tokenizer, on_bad="error"))
    model = model_for(tokenizer)
    shared = layout == "shared"
    step = collate(groups, "padded" if shared else layout, max_sequences=3, share_prompt=shared)
    token_logps, cu_seqlens, _ = forward_parts(step.parts, SharedPromptForward(model))
    sums, lengths = [], []
    for group in groups:
        for i, response in enumerate(group.responses):
            ids = torch.cat([group.prompt, response]).long()
            logps = model(ids[None]).logits[0].log_softmax(-1)[len(group.prompt) - 1 : -1]
            own = logps.gather(1, response.long()[:, None])[:, 0][group.scored_of(i)]
            sums.append(own.sum())
            lengths.append(len(own))
    assert cu_seqlens.diff().tolist() == lengths and len(groups) == 2
    torch.testing.assert_close(seq_logps(token_logps, cu_seqlens), torch.stack(sums), rtol=1e-5, atol=1e-5)
    objective = Objective("softmax", beta=2.0, average=True, reference_free=True, nll_weight=1.0)
    found = preference_loss(token_logps, cu_seqlens, step.groups, objective)
    flat = torch.stack(sums)
    n = torch.tensor(lengths)
    u, losses = (2.0 * flat / n).split(5), []
    for k, part in enumerate(u):
        nll = -(flat / n)[5 * k : 5 * k + 2].mean()
        losses.append(
            sum(torch.logsumexp(torch.cat([part[i : i + 1], part[2:]]), 0) - part[i] for i in (0, 1)) / 2 + nll
        )
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
    weight = model.model.layers[0].self_attn.q_proj.weight
    a, b = (torch.autograd.grad(x, weight)[0] for x in (found.loss, expected))
    assert (a - b).norm() < 1e-5 * b.norm()


def test_the_trainer_takes_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("qwen2_5")
    runs = []
    for options in (
        {"strategy": "coupled"},
        {"strategy": "two_pass", "micro_batch_sequences": 2},
        {"assistant_only": False},
    ):
        model = llama()
        model.resize_token_embeddings(len(tokenizer))
        model.requires_grad_(True)
        config = GroupDPOConfig(
            str(tmp_path), **{**COMMON, "max_steps": 2, "per_device_train_batch_size": 1, **options}
        )
        rows = [SETS, {**SETS, "prompt": [asks("Warm?")]}]
        torch.manual_seed(0)
        runs.append(run(GroupDPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)))
    (a, start, coupled), (b, _, two_pass), (c, *_) = runs
    assert (coupled - two_pass).norm() < 1e-4 * (coupled - start).norm()
    first = [steps(trainer)[0] for trainer in (a, b, c)]
    assert first[0]["logps/chosen"] == pytest.approx(first[1]["logps/chosen"], rel=1e-5)
    assert first[2]["logps/chosen"] < first[0]["logps/chosen"]  # tools' words cost something too


def test_scores_of_turns(tmp_path: Path) -> None:
    """`logps`: number of tokens and their sum are those of the assistant's turns."""
    tokenizer = tokenizer_with("qwen2_5")
    model = model_for(tokenizer).float()
    source, target = tmp_path / "rows.jsonl", tmp_path / "logps.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (SETS, ROW)))
    scoring.score_file(model, tokenizer, source, target, scoring.ScoringOptions())
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    groups = list(tokenize_groups(read_groups([SETS, ROW]), tokenizer))
    counts = [int(group.scored_of(i).sum()) for group in groups for i in range(len(group.responses))]
    assert [line["num_tokens"] for line in lines] == counts
