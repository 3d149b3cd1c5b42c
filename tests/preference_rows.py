"""One honest example row of every format: made-up content, real structure."""

from __future__ import annotations

from typing import Any


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
