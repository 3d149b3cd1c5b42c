"""Rows of every format -> groups -> tokens -> batches: what is read, what is dropped, what is scored."""

from __future__ import annotations

import ast
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tiny_models import BASE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader

from groupdpo_kernels import data
from groupdpo_kernels.backward import group_backward
from groupdpo_kernels.data import (
    FORMATS,
    RULES,
    Group,
    Report,
    collate,
    margin,
    merge_prompts,
    ranks,
    read_groups,
    threshold,
    tokenize_groups,
    top_k,
)
from groupdpo_kernels.groups import PreferenceGroups
from groupdpo_kernels.logps import seq_logps
from groupdpo_kernels.models import model_logps
from groupdpo_kernels.objectives import Objective, preference_loss


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TEA = user("How long does tea steep?")
ANSWERS = {"prompt": "How long does tea steep?", "chosen": "Three minutes.", "rejected": "An hour."}


def completion(response: str, overall: float, fine: float, honesty: str) -> dict[str, Any]:
    """As in openbmb/UltraFeedback."""
    aspects = {"helpfulness": "3", "honesty": honesty, "instruction_following": "N/A", "truthfulness": "4"}
    return {
        "model": "a-model",
        "principle": "helpfulness",
        "custom_system_prompt": "Help.",
        "response": response,
        "annotations": {name: {"Rating": rating, "Rationale": "why"} for name, rating in aspects.items()},
        "overall_score": overall,
        "fine-grained_score": fine,
        "critique": "words",
    }


ULTRAFEEDBACK = {
    "source": "a-set",
    "instruction": "How long does tea steep?",
    "models": ["a", "b", "c"],
    "completions": [
        completion("An hour.", 2.0, 4.5, "1"),
        completion("Three minutes.", 8.5, 3.0, "2"),
        completion("No idea.", 1.0, 1.0, "5"),
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
PAIR = [*TEA, says("Three minutes.")], [*TEA, says("An hour.")]
# case: row, format, prompt, positives, negatives
EXAMPLES: dict[str, tuple[dict[str, Any], str, Any, list[str], list[str]]] = {
    "sets": (
        {"prompt": "Tea?", "positives": ["Green.", "Black."], "negatives": ["Coffee."]},
        "sets",
        "Tea?",
        ["Green.", "Black."],
        ["Coffee."],
    ),
    "sets of messages": (
        {"prompt": TEA, "positives": [[says("Three minutes.")], [says("Four.")]], "negatives": [[says("An hour.")]]},
        "sets",
        TEA,
        ["Three minutes.", "Four."],
        ["An hour."],
    ),
    "texts": (ANSWERS, "pairs", ANSWERS["prompt"], ["Three minutes."], ["An hour."]),
    "lists": (
        ANSWERS | {"chosen": ["Three minutes.", "Four."]},
        "pairs",
        ANSWERS["prompt"],
        ["Three minutes.", "Four."],
        ["An hour."],
    ),
    "messages": (
        {"prompt": TEA, "chosen": [says("Three minutes.")], "rejected": [says("An hour.")]},
        "pairs",
        TEA,
        ["Three minutes."],
        ["An hour."],
    ),
    "implicit prompt": (
        {"chosen": PAIR[0], "rejected": PAIR[1]},
        "pairs",
        TEA,
        ["Three minutes."],
        ["An hour."],
    ),
    # as in HuggingFaceH4/ultrafeedback_binarized: the prompt's text and the conversations, too
    "binarized": (
        {
            "prompt": ANSWERS["prompt"],
            "prompt_id": "1",
            "chosen": [SYSTEM, *PAIR[0]],
            "rejected": [SYSTEM, *PAIR[1]],
            "messages": PAIR[0],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        "pairs",
        [SYSTEM, *TEA],
        ["Three minutes."],
        ["An hour."],
    ),
    # as in Anthropic/hh-rlhf
    "transcripts": (
        {
            "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Green.",
            "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Coffee.",
        },
        "pairs",
        [*user("Hi."), says("Hello."), *user("Tea?")],
        ["Green."],
        ["Coffee."],
    ),
    "ultrafeedback": (ULTRAFEEDBACK, "ultrafeedback", TEA, ["Three minutes."], ["An hour.", "No idea."]),
    "ultrafeedback fine": (
        ULTRAFEEDBACK,
        "ultrafeedback_fine_grained",
        TEA,
        ["An hour."],
        ["Three minutes.", "No idea."],
    ),
    "ultrafeedback annotations": (
        ULTRAFEEDBACK,
        "ultrafeedback_annotations",
        TEA,
        ["No idea."],
        ["Three minutes.", "An hour."],
    ),
    # as in berkeley-nest/Nectar
    "nectar": (
        {
            "prompt": "\n\nHuman: How long does tea steep?\n\nAssistant: ",
            "answers": [
                {"answer": "An hour.", "model": "a", "rank": 2.0},
                {"answer": "Three minutes.", "model": "b", "rank": 1.0},
                {"answer": "No idea.", "model": "c", "rank": 3.0},
            ],
            "turns": 1,
            "num_responses": 3,
            "source": ["a-set"],
            "good_natured": True,
        },
        "nectar",
        TEA,
        ["Three minutes."],
        ["An hour.", "No idea."],
    ),
    # as in princeton-nlp/llama3-ultrafeedback-armorm
    "listed": (
        {
            "prompt_id": "1",
            "prompt": ANSWERS["prompt"],
            "all_generated_responses": ["An hour.", "Three minutes.", "Three minutes."],
            "all_rm_scores": [0.1, 0.2, 0.2],
            "chosen": PAIR[0],
            "rejected": PAIR[1],
        },
        "listed",
        TEA,
        ["Three minutes."],
        ["An hour."],
    ),
    "listed after messages": (
        {"prompt": [SYSTEM, *TEA], "all_generated_responses": ["A", "B", "C"], "scores": [2.0, 1.0, 3.0]},
        "listed",
        [SYSTEM, *TEA],
        ["C"],
        ["A", "B"],
    ),
    # as in the REBEL data
    "numbered": (
        {
            "prompt": ANSWERS["prompt"],
            "response_0": "An hour.",
            "response_1": "Three minutes.",
            "response_10": "No idea.",
            "response_0_reward": -1.5,
            "response_1_reward": 2.0,
            "response_10_reward": -9.0,
            "chosen": "Three minutes.",
            "reject": "An hour.",
        },
        "numbered",
        TEA,
        ["Three minutes."],
        ["An hour.", "No idea."],
    ),
    # LLaMA-Factory
    "alpaca": (
        {
            "instruction": "Answer.",
            "input": "Tea?",
            "chosen": "Green.",
            "rejected": "Coffee.",
            "system": "Be brief.",
            "history": [["Hi.", "Hello."]],
        },
        "alpaca",
        [SYSTEM, *user("Hi."), says("Hello."), *user("Answer.\nTea?")],
        ["Green."],
        ["Coffee."],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Tea?"},
            ],
            "chosen": {"from": "gpt", "value": "Green."},
            "rejected": {"from": "gpt", "value": "Coffee."},
            "system": "Be brief.",
        },
        "sharegpt",
        [SYSTEM, *user("Hi."), says("Hello."), *user("Tea?")],
        ["Green."],
        ["Coffee."],
    ),
    "ms-swift": (
        {"messages": [SYSTEM, *PAIR[0]], "rejected_response": "An hour."},
        "ms_swift",
        [SYSTEM, *TEA],
        ["Three minutes."],
        ["An hour."],
    ),
    "ms-swift messages": (
        {"messages": PAIR[0], "rejected_messages": PAIR[1]},
        "ms_swift",
        TEA,
        ["Three minutes."],
        ["An hour."],
    ),
}


@pytest.mark.parametrize("case", EXAMPLES)
@pytest.mark.parametrize("how", ["auto", "forced", "table"])
def test_formats(case: str, how: str) -> None:
    row, name, prompt, positives, negatives = EXAMPLES[case]
    insists = how == "forced" or name.startswith("ultrafeedback_")
    # A table fills the columns of other rows, and the fields of other messages, with None.
    rows = datasets.Dataset.from_list([row, {"another": 1}]).select([0]) if how == "table" else row
    (group,) = read_groups(rows, name if insists else "auto", on_bad="drop")
    assert group.prompt == prompt
    assert [r for r, p in zip(group.responses, group.positive) if p] == positives
    assert [r for r, p in zip(group.responses, group.positive) if not p] == negatives


def test_every_format_has_an_example() -> None:
    assert {name for _, name, *_ in EXAMPLES.values()} == set(FORMATS)


def test_unknown_columns_are_an_error_that_lists_both() -> None:
    with pytest.raises(ValueError, match=r"row 1: .*nectar: prompt, answers;.*got answer, prompt"):
        list(read_groups([ANSWERS, {"prompt": "Tea?", "answer": "Green."}]))
    with pytest.raises(ValueError, match=r"\(sets: prompt, positives, negatives\); got chosen, prompt, rejected"):
        list(read_groups(ANSWERS, "sets"))
    with pytest.raises(TypeError, match="row 0 is a str"):
        list(read_groups(["Tea?"]))  # type: ignore[list-item]
    for wrong in ({"format": "parquet"}, {"rule": "best"}, {"on_bad": "ignore"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
            read_groups([ANSWERS], **wrong)  # before anything is read


def test_columns_can_be_renamed() -> None:
    row = {"instruction": "Tea?", "generations": ["Coffee.", "Green."], "ratings": [1, 5]}
    names = {"instruction": "prompt", "generations": "all_generated_responses", "ratings": "scores"}
    (group,) = read_groups([row], rename=names)
    assert group == Group(user("Tea?"), ["Green.", "Coffee."], [True, False], 0)


def test_reading_and_tokenising_are_lazy(bpe: Any) -> None:
    pulled = []

    def rows() -> Any:
        for i in range(10_000):
            pulled.append(i)
            yield ANSWERS

    next(read_groups(rows()))
    assert len(pulled) == 1
    next(tokenize_groups(read_groups(rows()), bpe))
    assert len(pulled) < 1000


def test_importing_needs_torch_alone() -> None:
    for name in ("data", "formats", "batches"):
        tree = ast.parse(Path(data.__file__).with_name(f"{name}.py").read_text())
        top = [ast.dump(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [node for node in top for name in ("transformers", "datasets", "numpy") if name in node]


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        (RULES["best_vs_rest"](), [1, 3, 2], "1+ 2- 0-"),
        (RULES["best_vs_rest"](), [1, 3, 3], "1+ 2+ 0-"),  # tied for the best: both
        (RULES["best_vs_rest"](), [2, 2], "0+ 1+"),  # then the group has no negative
        (top_k(2), [4, 1, 3, 2], "0+ 2+ 3- 1-"),
        (top_k(2, bottom=1), [4, 1, 3, 2], "0+ 2+ 1-"),
        (top_k(1), [3, 3, 1], "2-"),  # tied across the cut: neither
        (top_k(2), [4, 3, 3, 1], "0+ 3-"),
        (top_k(1, bottom=1), [4, 2, 2, 2], "0+"),  # which of the three is the worst is not known
        (top_k(3), [2, 1], "0+ 1+"),
        (threshold(), [1, 2, 6], "2+ 1- 0-"),  # mean 3
        (threshold("median"), [1, 2, 6], "2+ 1+ 0-"),  # equal to the threshold: positive
        (threshold(4.0), [4, 3.9, 5], "2+ 0+ 1-"),
        (threshold(4.0, below=2.0), [4, 3, 2, 1.9], "0+ 3-"),  # between: neither
        (margin(2.0), [5, 4, 3, 5, 1], "0+ 3+ 2- 4-"),  # tied for the best: both; lower by exactly 2: negative
        (ranks(), [1, 3, 2], "1+ 2- 0-"),
        (ranks(positives=2), [1, 3, 2], "1+ 2+ 0-"),
        (ranks(), [3, 1, 3, 2, 1], "0+ 3- 1-"),  # tied: the first stays
    ],
)
def test_rules(rule: Any, scores: list[float], expected: str) -> None:
    assert " ".join(f"{i}{'+' if side else '-'}" for i, side in rule(scores)) == expected


def test_ranked_groups_are_best_first_and_positives_first() -> None:
    (group,) = read_groups(EXAMPLES["nectar"][0], rule="ranks")
    assert group.responses == ["Three minutes.", "An hour.", "No idea."]
    assert PreferenceGroups.from_lists([group.positive]).positives_first()


def test_wrong_options_of_rules() -> None:
    for make, options in [
        (top_k, {"k": 0}),
        (top_k, {"bottom": 0}),
        (threshold, {"at": "mode"}),
        (threshold, {"below": 1.0}),
        (margin, {"by": 0.0}),
        (ranks, {"positives": 0}),
    ]:
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)


# ---- what is dropped -------------------------------------------------------------------------------------------------

SCORED = {"prompt": "Tea?", "all_generated_responses": ["Green.", "Coffee."], "all_rm_scores": [2.0, 1.0]}
# reason: a row that has it, whether the rest of the row is kept
BAD: dict[str, list[tuple[dict[str, Any], bool]]] = {
    "malformed": [
        (ANSWERS | {"chosen": 3}, False),
        (ANSWERS | {"chosen": None}, False),
        (SCORED | {"all_rm_scores": [1.0]}, False),
        (SCORED | {"all_generated_responses": ["Green.", None]}, False),
        ({"prompt": "Tea?", "answers": [{"answer": "Green."}]}, False),
        ({"instruction": "Tea?", "completions": "Green."}, False),
        ({"chosen": [*TEA, says("A"), *TEA], "rejected": PAIR[1]}, False),  # ends with the user
        ({"chosen": [*TEA, says("A") | {"tool_calls": [1]}], "rejected": PAIR[1]}, False),
        ({"prompt": [*TEA, says("It")], "chosen": [says("is")], "rejected": [says("was")]}, False),
        ({"conversations": [{"from": "function_call", "value": "{}"}], "chosen": "A", "rejected": "B"}, False),
    ],
    "other context": [
        ({"chosen": PAIR[0], "rejected": [*user("Coffee?"), says("No.")]}, False),
        ({"prompt": "Coffee?", "chosen": PAIR[0], "rejected": PAIR[1]}, False),
        ({"prompt": user("Coffee?"), "chosen": PAIR[0], "rejected": PAIR[1]}, False),
    ],
    "no prompt": [
        ({"chosen": "Green.", "rejected": "Coffee."}, False),
        (ANSWERS | {"prompt": ""}, False),
        (SCORED | {"prompt": " "}, False),
        ({"chosen": [says("A")], "rejected": [says("B")]}, False),
    ],
    "empty": [(ANSWERS | {"chosen": ["Green.", " \n"]}, True)],
    "no score": [
        (SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [2.0, None, 1.0]}, True),
        (SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [2.0, float("nan"), 1.0]}, True),
    ],
    "duplicate": [
        (ANSWERS | {"chosen": ["Green.", "Green."]}, True),
        (SCORED | {"all_generated_responses": ["A", "B", "A"], "all_rm_scores": [2.0, 1.0, 2.0]}, True),
    ],
    "on both sides": [(ANSWERS | {"chosen": ["Green.", "Black."], "rejected": ["Coffee.", "Black."]}, True)],
    "no positive": [(ANSWERS | {"chosen": []}, False)],
    "no negative": [(ANSWERS | {"rejected": []}, False), (SCORED | {"all_rm_scores": [1.0, 1.0]}, False)],
}


@pytest.mark.parametrize(("reason", "row", "kept"), [(reason, *case) for reason in BAD for case in BAD[reason]])
def test_bad_rows_are_counted_or_named(reason: str, row: dict[str, Any], kept: bool) -> None:
    report = Report()
    groups = list(read_groups([ANSWERS, row], report=report))
    assert report.dropped == {reason: 1} and report.rows == 2
    assert len(groups) == 1 + kept == report.kept["read"][0]
    assert sum(len(g.responses) for g in groups) == report.kept["read"][1]
    with pytest.raises(ValueError, match=r"^row 1: "):
        list(read_groups([ANSWERS, row], on_bad="error"))


def test_what_a_rule_leaves_out_is_counted_and_no_error() -> None:
    row = SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [3.0, 2.5, 1.0]}
    report = Report()
    (group,) = read_groups(row, rule=margin(1.0), on_bad="error", report=report)
    assert group.responses == ["A", "C"] and report.dropped == {"left out by the rule": 1}


def test_report_reads_well() -> None:
    report = Report()
    rows = [ANSWERS, ANSWERS | {"chosen": []}, ANSWERS | {"rejected": ["", "Cold."]}]
    list(merge_prompts(read_groups(rows, report=report), report=report))
    assert str(report).splitlines() == [
        "3 rows",
        "  read: 2 groups, 4 responses",
        "  merged: 1 group, 3 responses",
        "  1 group merged into an earlier one of the same prompt",
        "  dropped 1 group: no positive (first: row 1: its group is left without a positive response)",
        "  dropped 1 response: empty (first: row 2: a response is empty)",
        "  dropped 1 response: duplicate (first: row 0: the response 'Three minutes.' is repeated)",
    ]


def test_merging_pairs_of_a_prompt() -> None:
    pairs = [("Tea?", "A", "B"), ("Milk?", "E", "F"), ("Tea?", "A", "C"), ("Tea?", "C", "D"), ("Milk?", "F", "E")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    report = Report()
    (group,) = merge_prompts(read_groups(rows), report=report)
    assert group == Group("Tea?", ["A", "B", "D"], [True, False, False], 0)  # C is on both sides
    assert report.dropped == {"duplicate": 1, "on both sides": 3, "no positive": 1} and report.merged == 3
    with pytest.raises(ValueError, match="row 0: the response 'A' is repeated"):
        list(merge_prompts(read_groups(rows), on_bad="error"))
    rows = [{"prompt": prompt, "chosen": "A", "rejected": "B"} for prompt in ("Tea?", user("Tea?"))]
    assert len(list(merge_prompts(read_groups(rows)))) == 2  # a text and a conversation are two prompts


# ---- tokens ----------------------------------------------------------------------------------------------------------

LINES = ["How long does tea steep? Three minutes. An hour. No idea.", "Be brief. Green. Coffee. Tea? Hi. Hello."]
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level_bpe(bos: bool = False) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )


@pytest.fixture(scope="module")
def bpe() -> Any:
    return byte_level_bpe()


@pytest.fixture(scope="module")
def sentencepiece_like() -> Any:
    """As Llama 2's: a space before every text, and bytes for what is not known."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted({"▁" + word for line in LINES for word in line.split()} | set("".join(LINES)) - {" "})
    scores = [(piece, -1.0 if len(piece) > 1 else -8.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tokens_of(tokenizer: Any, *groups: Group, **options: Any) -> list[Any]:
    return list(tokenize_groups(groups, tokenizer, **options))


def test_plain_text_is_prompt_and_response_with_eos(bpe: Any) -> None:
    group = Group("How long does tea", [" steep?", "steep? Hi.</s>"], [True, False], 7)
    (tokens,) = tokens_of(bpe, group)
    assert tokens.row == 7 and tokens.positive == [True, False]
    assert bpe.decode(tokens.prompt) == "How long does tea"
    assert [bpe.decode(r) for r in tokens.responses] == [" steep?</s>", "steep? Hi.</s>"]  # one eos, never two
    (tokens,) = tokens_of(bpe, group, add_eos=False)
    assert [bpe.decode(r) for r in tokens.responses] == [" steep?", "steep? Hi.</s>"]


def test_no_token_spans_the_border(bpe: Any) -> None:
    """ "Th" + "ree" is one token of the whole text: the response keeps its own tokens."""
    whole = bpe("Three")["input_ids"]
    (tokens,) = tokens_of(bpe, Group("Th", ["ree", "e"], [True, False], 0), add_eos=False)
    assert tokens.prompt.tolist() + tokens.responses[0].tolist() != whole
    assert tokens.prompt.tolist() == bpe("Th")["input_ids"] and tokens.responses[0].tolist() == bpe("ree")["input_ids"]


def test_bos_is_put_before_plain_prompts_alone() -> None:
    tokenizer = byte_level_bpe(bos=True)
    (plain,) = tokens_of(tokenizer, Group("Tea?", ["Green.", "Coffee."], [True, False], 0))
    assert plain.prompt.tolist() == tokenizer("Tea?")["input_ids"] and plain.prompt[0] == 1
    assert all(1 not in r for r in plain.responses)
    (chat,) = tokens_of(tokenizer, Group(TEA, ["Green.", "Coffee."], [True, False], 0))
    assert 1 not in chat.prompt  # a template writes its own


def test_no_space_is_put_between_prompt_and_response(sentencepiece_like: Any) -> None:
    tokenizer = sentencepiece_like
    assert tokenizer.convert_ids_to_tokens(tokenizer("Green.")["input_ids"]) == ["<s>", "▁Green."]
    (tokens,) = tokens_of(tokenizer, Group("Tea?", [" Green.", "Green.", "\nHi."], [True, False, False], 0))
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == ["<s>", "▁Tea?"]
    responses = [tokenizer.convert_ids_to_tokens(r) for r in tokens.responses]
    assert responses[0] == ["▁Green.", "</s>"]
    assert responses[1] == [*"Green.", "</s>"]
    assert responses[2] == ["<0x0A>", *"Hi.", "</s>"]
    for text, ids in zip([" Green.", "Green.", "\nHi."], tokens.responses):
        assert [*tokens.prompt.tolist(), *ids.tolist()[:-1]] == tokenizer("Tea?" + text)["input_ids"]


def test_conversations_go_through_the_template(bpe: Any) -> None:
    group = Group([SYSTEM, *TEA], ["Three minutes.", "An hour."], [True, False], 0)
    (tokens,) = tokens_of(bpe, group)
    header = bpe.apply_chat_template(group.prompt, tokenize=False, add_generation_prompt=True)
    assert bpe.decode(tokens.prompt) == header
    assert [bpe.decode(r) for r in tokens.responses] == ["Three minutes.</s>", "An hour.</s>"]  # without the line end
    whole = bpe.apply_chat_template([*group.prompt, says("An hour.")], tokenize=False)
    assert whole == header + "An hour.</s>\n"


def test_chat_by_choice(bpe: Any) -> None:
    text, turn = (Group(prompt, ["A", "B"], [True, False], 0) for prompt in ("Tea?", user("Tea?")))
    as_text, as_turn = (tokens_of(bpe, group)[0].prompt for group in (text, turn))
    assert torch.equal(tokens_of(bpe, turn, chat=False)[0].prompt, as_text)
    assert torch.equal(tokens_of(bpe, text, chat=True)[0].prompt, as_turn)
    assert len(as_turn) > len(as_text)
    report = Report()
    assert not tokens_of(bpe, Group([SYSTEM, *TEA], ["A", "B"], [True, False], 3), chat=False, report=report)
    assert report.first["template"].startswith("row 3: chat=False takes one turn")


def test_templates_that_do_not_fit(bpe: Any, sentencepiece_like: Any) -> None:
    group = Group([*TEA, {"role": "tool", "content": "x"}], ["A", "B"], [True, False], 4)
    with pytest.raises(ValueError, match="row 4: the chat template refuses it: no tools"):
        tokens_of(bpe, group, on_bad="error")
    with pytest.raises(ValueError, match="tokenizer has no chat_template for the conversation of row 5"):
        tokens_of(sentencepiece_like, Group(TEA, ["A", "B"], [True, False], 5))
    thinking = byte_level_bpe()
    thinking.chat_template = CHATML + "{% if think and add_generation_prompt %}<think>{% endif %}"
    group = Group(TEA, ["A", "B"], [True, False], 6)
    assert tokens_of(thinking, group)
    with pytest.raises(ValueError, match="row 6: the chat template does not continue its own prompt"):
        tokens_of(thinking, group, template_options={"think": True}, on_bad="error")
    no_eos = transformers.PreTrainedTokenizerFast(tokenizer_object=thinking.backend_tokenizer)
    with pytest.raises(ValueError, match="eos"):
        tokens_of(no_eos, group)
    assert tokens_of(no_eos, Group("Tea?", ["A", "B"], [True, False], 6), add_eos=False)


def test_too_long() -> None:
    tokenizer = byte_level_bpe(bos=True)
    texts = ["ABCDEFG", "XY", "ABCDEFGHIJKLMNOPQRST"]  # a token a character, and eos
    group = Group("0123456789", texts, [True, False, False], 2)  # and bos

    def lengths(max_length: int, **options: Any) -> tuple[int, list[int]]:
        (tokens,) = tokens_of(tokenizer, group, max_length=max_length, **options)
        assert len(tokens.prompt) + max(map(len, tokens.responses)) <= max_length
        return len(tokens.prompt), [len(r) for r in tokens.responses]

    assert lengths(32) == (11, [8, 3, 21])
    report = Report()
    assert lengths(31, report=report, on_bad="error") == (11, [8, 3])  # dropping it is the choice made
    assert report.dropped == {"too long": 1}
    with pytest.raises(ValueError, match="row 2: a response of 21 tokens has room for 20, with a prompt of 11"):
        tokens_of(tokenizer, group, max_length=31, too_long="error")
    assert lengths(25, too_long="truncate_prompt") == (4, [8, 3, 21])
    (tokens,) = tokens_of(tokenizer, group, max_length=25, too_long="truncate_prompt")
    assert tokenizer.decode(tokens.prompt) == "<s>789"
    assert lengths(23, too_long="truncate_prompt") == (2, [8, 3, 21])
    assert lengths(22, too_long="truncate_prompt") == (11, [8, 3])  # without the long one nothing is cut
    with pytest.raises(ValueError, match="row 2: a response of 21 tokens has room for 20"):
        tokens_of(tokenizer, group, max_length=22, too_long="truncate_prompt", on_bad="error")
    report = Report()
    assert not tokens_of(tokenizer, group, max_length=5, report=report)
    assert report.dropped == {"too long": 3, "no positive": 1}
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokens_of(tokenizer, group, max_length=1)
    with pytest.raises(ValueError, match="too_long must be one of drop, error, truncate_prompt"):
        tokens_of(tokenizer, group, max_length=8, too_long="cut")


def test_texts_without_tokens() -> None:
    words = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "c": 3}, []))  # no token for anything else
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    report = Report()
    groups = [Group("a", ["b", "z", "c"], [True, False, False], 0), Group("z", ["b", "c"], [True, False], 1)]
    (tokens,) = tokens_of(tokenizer, *groups, report=report)
    assert [r.tolist() for r in tokens.responses] == [[2, 0], [3, 0]]
    assert report.dropped == {"empty": 1, "no prompt": 1} and report.kept == {"tokenized": (1, 2)}


# ---- batches ---------------------------------------------------------------------------------------------------------


def random_groups(n: int, seed: int, vocab: int = 509) -> list[data.TokenGroup]:
    r = random.Random(seed)

    def ids(longest: int) -> torch.Tensor:
        return torch.tensor([r.randrange(3, vocab) for _ in range(r.randint(1, longest))], dtype=torch.int32)

    groups = []
    for g in range(n):
        sides = [True, False] + [r.random() < 0.5 for _ in range(r.randint(0, 4))]
        r.shuffle(sides)
        groups.append(data.TokenGroup(ids(9), [ids(7) for _ in sides], sides, g))
    return groups


LIMITS = [{}, {"max_sequences": 1}, {"max_sequences": 3}, {"max_tokens": 16}, {"max_tokens": 40, "max_sequences": 4}]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_collate(layout: str, limits: dict[str, int], sort: bool) -> None:
    for seed in range(3):
        groups = random_groups(7, seed)
        step = collate(groups, layout, sort=sort, pad_id=1, **limits)
        sequences = [(g.prompt.tolist(), r.tolist(), side) for g in groups for r, side in zip(g.responses, g.positive)]
        expected = [sequences[i] for i in step.order.tolist()]
        assert sorted(step.order.tolist()) == list(range(len(sequences)))
        assert sort or step.order.tolist() == list(range(len(sequences)))
        assert step.groups.positive.tolist() == [side for *_, side in expected]
        sizes = [len(g.responses) for g in groups]
        if not sort:
            assert step.groups.cu_groups.diff().tolist() == sizes
        found = []
        for mb in step.micro_batches:
            B, L = mb.input_ids.shape
            assert mb.targets.shape == (B, L) and all(x.shape == (B, L) for x in mb.inputs.values())
            assert limits.get("max_tokens", 10**9) >= B * L
            lengths = mb.cu_seqlens.diff().tolist()
            assert len(lengths) <= limits.get("max_sequences", 10**9) and (layout == "packed" or len(lengths) == B)
            assert mb.cu_seqlens.dtype == torch.int32 and mb.cu_seqlens[0] == 0
            assert torch.equal(mb.live(mb.targets), mb.targets[mb.targets != -100])
            scored = mb.live(mb.targets).split(lengths)
            if layout == "packed":
                rows = mb.input_ids[0].tensor_split((mb.inputs["position_ids"][0] == 0).nonzero()[1:, 0])
            else:
                rows = [ids[mask.bool()] for ids, mask in zip(mb.input_ids, mb.inputs["attention_mask"])]
                assert (mb.input_ids[mb.inputs["attention_mask"] == 0] == 1).all()
            for ids, response in zip(rows, scored):
                assert ids[-len(response) :].tolist() == response.tolist()
                found.append((ids[: -len(response)].tolist(), response.tolist()))
            # What stands at a live place is the token before its target.
            before = mb.live(mb.input_ids).split(lengths)
            for (prompt, response), b in zip(found[-len(lengths) :], before):
                assert b.tolist() == [prompt[-1], *response[:-1]]
        assert found == [(prompt, response) for prompt, response, _ in expected]
        if not limits:
            assert len(step.micro_batches) == 1


def test_sorting_puts_the_longest_groups_first_and_keeps_them_whole() -> None:
    def size(step: data.PreferenceBatch) -> int:
        return sum(mb.input_ids.numel() for mb in step.micro_batches)

    def sums(step: data.PreferenceBatch) -> torch.Tensor:
        return torch.cat([seq_logps(mb.live(mb.targets).double(), mb.cu_seqlens) for mb in step.micro_batches])

    groups = random_groups(30, 3)
    step = collate(groups, "padded", max_sequences=8, sort=True)
    plain = collate(groups, "padded", max_sequences=8)
    widths = [mb.input_ids.shape[1] for mb in step.micro_batches]
    assert widths == sorted(widths, reverse=True)
    assert size(step) < size(plain)
    assert sorted(step.groups.cu_groups.diff().tolist()) == sorted(plain.groups.cu_groups.diff().tolist())
    undone = torch.empty(step.groups.num_sequences, dtype=torch.float64)
    undone[step.order] = sums(step)
    assert torch.equal(undone, sums(plain))


def test_collate_refuses() -> None:
    groups = random_groups(3, 0)
    longest = max(len(g.prompt) + len(r) for g in groups for r in g.responses)
    with pytest.raises(ValueError, match=rf"max_tokens must be at least {longest}, the sequence of row \d; got"):
        collate(groups, max_tokens=longest - 1)
    with pytest.raises(ValueError, match="groups must hold at least one group"):
        collate([])
    with pytest.raises(ValueError, match="layout must be one of packed, padded; got 'ragged'"):
        collate(groups, "ragged")
    with pytest.raises(ValueError, match="max_sequences must be at least 1"):
        collate(groups, max_sequences=0)


def test_batches_move_and_pass_through_a_loader() -> None:
    groups = random_groups(10, 1)
    steps = list(DataLoader(groups, batch_size=4, collate_fn=collate))
    assert [step.groups.num_groups for step in steps] == [4, 4, 2]
    moved = steps[0].to("meta")
    mb = moved.micro_batches[0]
    tensors = [mb.input_ids, mb.targets, mb.cu_seqlens, mb.live_index, *mb.inputs.values()]
    assert all(x.is_meta for x in [*tensors, moved.groups.positive, moved.order])


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_from_rows_to_a_loss_as_if_each_response_were_alone(bpe: Any) -> None:
    rows = [EXAMPLES[case][0] for case in ("ultrafeedback", "nectar", "alpaca", "texts", "lists", "sets")]
    report = Report()
    groups = merge_prompts(read_groups(rows, rule=top_k(1), report=report), report=report)
    tokens = list(tokenize_groups(groups, bpe, max_length=128, report=report))
    assert report.kept["tokenized"] == (len(tokens), sum(len(g.responses) for g in tokens)) and len(tokens) == 4

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**BASE | {"vocab_size": len(bpe)})
    model = transformers.LlamaForCausalLM(config).double().eval()
    objective = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)

    alone = []  # the sum over the response of log p, from the logits of one unpadded sequence
    ref_logps = torch.randn(sum(len(g.responses) for g in tokens), dtype=torch.float64)
    for group in tokens:
        for response in group.responses:
            ids = torch.cat([group.prompt, response]).long()
            logps = model(ids[None]).logits[0].log_softmax(-1)
            alone.append(logps[:-1].gather(1, ids[1:, None])[len(group.prompt) - 1 :, 0])
    lengths = torch.tensor([0, *map(len, alone)]).cumsum(0).int()
    sides = PreferenceGroups.from_lists(g.positive for g in tokens)
    expected = preference_loss(torch.cat(alone), lengths, sides, objective, ref_logps)
    expected.loss.backward()
    d_parameters = [p.grad.clone() for p in model.parameters()]

    def forward(mb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs)), mb.cu_seqlens

    for layout in ("packed", "padded"):
        step = collate(tokens, layout)
        token_logps, cu_seqlens = forward(step.micro_batches[0])
        torch.testing.assert_close(token_logps, torch.cat(alone), rtol=1e-11, atol=1e-11)
        loss = preference_loss(token_logps, cu_seqlens, step.groups, objective, ref_logps).loss
        torch.testing.assert_close(loss, expected.loss, rtol=1e-11, atol=1e-11)
        for limits in ({"max_sequences": 2}, {"max_tokens": 150, "sort": True}):
            step = collate(tokens, layout, **limits)
            assert len(step.micro_batches) > 1
            model.zero_grad()
            result = group_backward(step.micro_batches, forward, step.groups, objective, ref_logps[step.order])
            torch.testing.assert_close(result.loss, expected.loss.detach(), rtol=1e-11, atol=1e-11)
            for p, d in zip(model.parameters(), d_parameters):
                torch.testing.assert_close(p.grad, d, rtol=1e-9, atol=1e-11)
