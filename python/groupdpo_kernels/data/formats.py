"""Preference rows as they are published become a prompt and its responses, which are on two sides or have scores.

`FORMATS` is the only list of formats: a row is recognised by its columns. This module handles texts; rules.py makes
groups of them, batches.py tokens and tensors. What any of the three drops is counted in a `Report`.

It never guesses at columns, repairs a text, or drops anything silently: what does not fit is a `BadRow` with a reason.
It needs responses that are a text, or messages of text that begin and end with one of the assistant: with reasoning,
tool calls and the turns of tools and users between, or without. Images belong to prompts.
The cost is tens of microseconds a row.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from ..checks import one_of, shown
from .images import places

Row = Mapping[str, Any]
Message = dict[str, Any]  # {"role": ..., "content": ...}
Prompt = str | list[Message]  # text that the response continues, or a conversation that it answers


class Turns(str):
    """A response that a text alone does not say: messages with reasoning or tool calls, or several of them, which begin
    and end with one of the assistant. Turns of the assistant are its own words, those of tools and users are not.

    The text is what the assistant writes in them, without its reasoning. Two are equal where their messages are, and
    none equals a plain text.
    """

    messages: list[Message]

    def __new__(cls, messages: list[Message]) -> Turns:
        own = [m for m in messages if m["role"] == "assistant"]
        calls = [json.dumps(m["tool_calls"], ensure_ascii=False) if m.get("tool_calls") else "" for m in own]
        made = super().__new__(cls, "\n".join(x for m, call in zip(own, calls) for x in (m["content"], call) if x))
        made.messages = messages
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turns) and self.messages == other.messages

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), len(self.messages)))

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy
        return Turns, (self.messages,)


def messages_of(response: str) -> list[Message]:
    """The messages of a response, which is a text or Turns."""
    return response.messages if isinstance(response, Turns) else [{"role": "assistant", "content": response}]


class Group(NamedTuple):
    """A prompt and its responses as texts."""

    prompt: Prompt
    responses: list[str]
    positive: list[bool]
    row: int  # number of the row that it was read from; a merged group has its first one
    weight: float = 1.0  # what it counts in the loss
    response_weights: list[float] | None = None  # what each response counts in its side; None for 1 each
    tools: list[Any] | None = None  # JSON schemas of what the assistant may call, for the chat template
    images: list[Any] | None = None  # of the prompt, in the order of their places in it, if it has any

    def only(self, kept: Sequence[int]) -> Group:
        """The group with these of its responses, by their numbers."""
        each = self.response_weights
        return self._replace(
            responses=[self.responses[i] for i in kept],
            positive=[self.positive[i] for i in kept],
            response_weights=None if each is None else [each[i] for i in kept],
        )


# Why something is dropped, and what the report counts for it. Causes stand before their consequences.
REASONS = {
    "malformed": "row",
    "other context": "row",
    "no prompt": "row",
    "template": "group",
    "empty": "response",
    "no score": "response",
    "duplicate": "response",
    "on both sides": "response",
    "left out by the rule": "response",
    "group of weight 0": "row",
    "response of weight 0": "response",
    "answer changed by the template": "response",
    "identical after the template": "response",
    "too long": "response",
    "no positive": "group",
    "no negative": "group",
}


class BadRow(Exception):
    """Why a row cannot be used: a reason of REASONS, which is counted, and a description."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class Report:
    """Counts what was kept and what was dropped. Give one object to every stage, and print it at the end."""

    rows: int = 0
    merged: int = 0  # groups that were merged into an earlier one of the same prompt
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)  # stage -> (groups, responses)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> how many
    first: dict[str, str] = field(default_factory=dict)  # reason -> description of the first case

    def keep(self, stage: str, responses: int) -> None:
        groups, total = self.kept.get(stage, (0, 0))
        self.kept[stage] = groups + 1, total + responses

    def drop(self, bad: BadRow, row: int, on_bad: str = "drop") -> None:
        """Counts one thing that is dropped; raises ValueError instead with on_bad="error"."""
        if on_bad == "error":
            raise ValueError(f"row {row}: {bad}") from None
        self.dropped[bad.reason] = self.dropped.get(bad.reason, 0) + 1
        self.first.setdefault(bad.reason, f"row {row}: {bad}")

    def has_both_sides(self, positive: Sequence[bool], row: int, on_bad: str) -> bool:
        """Whether a group has a positive and a negative; if not, it is counted as dropped."""
        for side, name in ((True, "positive"), (False, "negative")):
            if side not in positive:
                self.drop(BadRow(f"no {name}", f"its group is left without a {name} response"), row, on_bad)
                return False
        return True

    def __str__(self) -> str:
        lines = [_count(self.rows, "row")]
        for stage, (groups, responses) in self.kept.items():
            lines.append(f"  {stage}: {_count(groups, 'group')}, {_count(responses, 'response')}")
        if self.merged:
            lines.append(f"  {_count(self.merged, 'group')} merged into an earlier one of the same prompt")
        for reason, what in REASONS.items():
            if n := self.dropped.get(reason):
                lines.append(f"  dropped {_count(n, what)}: {reason} (first: {self.first[reason]})")
        return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


# ---- messages --------------------------------------------------------------------------------------------------------

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names
# Templates write any role as it is: one with an invisible or a look-alike letter would become another speaker.
_ROLE = re.compile(r"[a-z][a-z0-9_-]*")
_DEEPEST = 100  # of nested values: templates and JSON recurse, and Python gives them a thousand calls
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _message(value: Any) -> Message:
    """A message as {"role", "content"}, from either convention, without the empty fields that a table adds."""
    if not isinstance(value, Mapping):
        raise BadRow("malformed", f"a message must be a dict; got {shown(value)}")
    if value.get("from") is not None:
        role, content = _ROLES.get(str(value["from"]), value["from"]), _text_of(value.get("value"))
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRow("malformed", f"a message must be of human, gpt, observation or system; got {shown(role)}")
        if not isinstance(content, str):
            raise BadRow("malformed", f"a message must be text; got {type(content).__name__}")
        rest = {k: v for k, v in value.items() if v is not None and k not in ("from", "value")}
        return {"role": role, "content": content, **rest}
    message = {k: _text_of(v) if k == "content" else _without_none(v) for k, v in value.items() if v is not None}
    role, content = message.get("role"), message.get("content")
    if role is None or (content is None and not message.get("tool_calls")):
        raise BadRow("malformed", f"a message must have a role and a content; got {', '.join(map(str, message))}")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise BadRow("malformed", f"a role must be a word of ASCII letters in lower case; got {shown(role)}")
    if not isinstance(content, (str, list, type(None))):
        raise BadRow("malformed", f"a message must be text; got {type(content).__name__}")
    _calls(message)
    return message


def _without_none(value: Any) -> Any:
    """Nested values without the empty fields that a table adds."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [*map(_without_none, value)] if isinstance(value, (list, tuple)) else value


def _text_of(content: Any) -> Any:
    """The text of a content that is a list of parts, as processors and APIs take them, or a list of texts and places of
    images; other contents are unchanged."""
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "image":
            if extra := sorted(k for k, v in part.items() if v is not None and k != "type"):
                raise BadRow(
                    "malformed", f"a place of an image must hold its type alone, the image is one of the column images;"
                    f" got {', '.join(extra)}"
                )  # fmt: skip
            continue
        kind = (
            part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else type(part).__name__
        )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow("malformed", f"a message must be of text and images alone; got a part of type {shown(kind)}")
    if any(part.get("type") == "image" for part in content):
        return [{k: part[k] for k in ("type", "text") if part.get(k) is not None} for part in content]
    return "".join(part["text"] for part in content)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow("malformed", f"messages must be a list; got {type(value).__name__}")
    return [_message(m) for m in value]


def _conversation(text: Any) -> list[Message]:
    """The user's text as a conversation, or messages as they are."""
    if isinstance(text, list):
        return _messages(text)
    if not isinstance(text, str):
        raise BadRow("malformed", f"a prompt must be text; got {type(text).__name__}")
    if not text.strip():
        return []
    return [{"role": "user", "content": text}]


# Columns that belong to the prompt in every format: these are read, and rows with those of _UNREAD are refused, because
# dropped silently they would change what the responses answer. Any other column is a note, and is not read.
_SYSTEM = ("system", "system_prompt")
_UNREAD = (
    *("functions", "documents", "context", "chat_template_kwargs"),
    *("audio", "audios", "video", "videos"),
)


def _with_context(prompt: Prompt, row: Row) -> Prompt:
    """The prompt after the row's system prompt and history; with either of them it becomes a conversation."""
    for name in _UNREAD:
        if row.get(name):
            raise BadRow("malformed", f"the column {name!r} belongs to the prompt and is not read: take it out; or put"
                         " what it says into the prompt")  # fmt: skip
    systems = {name: row[name] for name in _SYSTEM if row.get(name)}
    history = row.get("history") or []
    if not systems and not history:
        return _conversation(prompt) if row.get("tools") or _images(row) else prompt
    turns: list[Message] = []
    for name, text in systems.items():
        if not isinstance(text, str) or (turns and turns[0]["content"] != text):
            raise BadRow("malformed", f"the column {name!r} must be the system prompt, as text; got {shown(text)}")
        turns = [{"role": "system", "content": text}]
    messages = _conversation(prompt)
    if messages[0].get("role") == "system":
        if turns and turns[0]["content"] != messages[0].get("content"):
            raise BadRow("malformed", "the system prompt of its column is not that of its messages")
        turns, messages = messages[:1], messages[1:]
    return [*turns, *_past(history), *messages]


def _images(row: Row) -> list[Any] | None:
    """The column "images", a list, or "image", one image: objects that a processor takes, or paths."""
    images, one = row.get("images"), row.get("image")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        raise BadRow("malformed", f"images must be a list; got a {type(images).__name__}")
    if one is not None and one != "":
        if images:
            raise BadRow("malformed", "a row must have images in one column, image or images; got both")
        images = [one]
    if any(isinstance(image, (list, tuple, Mapping)) for image in images):  # a processor looks for addresses in lists
        raise BadRow("malformed", f"an image must be an object or a path; got {shown(images)}")
    if any(isinstance(image, str) and "://" in image for image in images):
        raise BadRow("malformed", "an image must be at hand, as an object or a path; got an address")
    return [*images] or None


def _tools(row: Row) -> list[Any] | None:
    """The column "tools": a list of JSON schemas, or the JSON text of one, as data sets hold it."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("malformed", f"tools must be a list of dicts, or JSON of one; got {shown(tools)}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("malformed", f"tools must be a list of dicts, or JSON of one; got {shown(tools)}")
    found: list[Any] = _without_none(tools)
    return found


def _past(history: Any) -> list[Message]:
    """The messages of a column "history": pairs of question and answer, or messages."""
    if isinstance(history, list) and all(isinstance(m, Mapping) for m in history):
        return _messages(history)
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("malformed", f"history must be pairs of question and answer, as text; got {shown(pair)}")
    turns = zip(("user", "assistant") * len(pairs), [text for pair in pairs for text in pair])
    return [{"role": role, "content": text} for role, text in turns]


def _transcript(text: str) -> list[Message] | None:
    r"""Messages of "\n\nHuman: ...\n\nAssistant: ...", without a last empty turn; None if it is no transcript."""
    lead, *parts = _SPEAKER.split(text)
    if lead.strip() or not parts:
        return None
    turns = [("user" if who == "Human" else "assistant", said.strip()) for who, said in zip(parts[::2], parts[1::2])]
    return [{"role": role, "content": said} for role, said in (turns if turns[-1][1] else turns[:-1])]


# ---- formats ---------------------------------------------------------------------------------------------------------


class Sided(NamedTuple):
    prompt: Prompt
    responses: list[str]
    positive: list[bool]
    weight: float = 1.0
    response_weights: list[float] | None = None  # in the order of responses
    tools: list[Any] | None = None
    images: list[Any] | None = None


class Scored(NamedTuple):
    prompt: Prompt
    responses: list[str]
    scores: list[Any]  # higher is better; as_score(x) is None for a missing score
    weight: float = 1.0
    response_weights: list[float] | None = None
    tools: list[Any] | None = None
    images: list[Any] | None = None


def as_score(value: Any) -> float | None:
    """The value as a number, also from text; None where it is not a finite number (None, "N/A", nan, inf)."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):  # the last for an int beyond all floats
        return None
    return score if math.isfinite(score) else None


def _with_weights(found: Sided | Scored, row: Row) -> Sided | Scored:
    """What was found, with the weights that the columns "weight" and "response_weights" give it, in every format."""
    each: Any = row.get("response_weights")
    n = len(found.responses)
    of = f" of {n} numbers, one a response"
    if each is not None and len(each := _list("response_weights", each, of)) != n:
        raise BadRow("malformed", f"response_weights must be a list{of}; got {len(each)} of them")
    return found._replace(
        weight=_weight("weight", row.get("weight", 1)),
        response_weights=None if each is None else [_weight("response_weights", x) for x in each],
    )


def _weight(name: str, value: Any) -> float:
    weight = None if isinstance(value, bool) else as_score(value)
    if weight is None or weight < 0:
        raise BadRow("malformed", f"{name} must be a finite number of at least 0; got {shown(value)}")
    return weight


def _answers(value: Any, prompt: Prompt | None) -> Iterator[tuple[Prompt | None, str]]:
    """Yields (what it answers, text) for a response or a list of them: a text, a message, or a whole conversation."""
    if isinstance(value, list) and not (value and isinstance(value[0], Mapping)):
        for one in value:
            yield from _answers(one, prompt)
        return
    turns = _transcript(value) if isinstance(value, str) and prompt is None else None
    if isinstance(value, str) and turns is None:
        yield prompt, value
        return
    messages = turns or _messages([value] if isinstance(value, Mapping) else value)
    # After a prompt of their own the assistant's words are the response; else it is the last message.
    answers = bool(prompt) and bool(messages) and messages[0].get("role") == "assistant"
    start = 0 if answers else len(messages) - 1
    context = messages[:start]
    response = _response(messages[start:])
    if isinstance(prompt, str):
        if context and all(m.get("content") != prompt for m in context):
            raise BadRow("other context", "prompt is not among the messages before the response")
        context = context or _conversation(prompt)
    elif prompt:
        context = context or prompt
        if prompt not in (context[: len(prompt)], context[-len(prompt) :]):  # the prompt may lack the system prompt
            raise BadRow("other context", "prompt is not among the messages before the response")
    yield context, response


def _response(messages: list[Message]) -> str:
    """The text of one message of the assistant, or Turns. BadRow for messages that no response has."""
    for m in messages:
        own = m.get("role") == "assistant"
        known = ("role", "content", "reasoning_content", "tool_calls") if own else _OF_OTHERS
        if extra := sorted(m.keys() - {*known}):
            what = ", ".join(known[:-1]) + f" and {known[-1]}"
            raise BadRow("malformed", f"a response must be messages of {what} alone; got {', '.join(extra)}")
        if own and _calls(m) and m.get("content") is None:
            m["content"] = ""
        if m.get("role") not in ("assistant", "tool", "user") or not isinstance(m.get("content"), str):
            raise BadRow(
                "malformed", f"a response must be messages of text, of the assistant, tools and users; got {shown(m)}"
            )
        if not isinstance(m.get("reasoning_content", ""), str):
            got = type(m["reasoning_content"]).__name__
            raise BadRow("malformed", f"reasoning_content must be text; got {got}")
    if not messages or not messages[0]["role"] == messages[-1]["role"] == "assistant":
        raise BadRow("malformed", "a response must begin and end with a message of the assistant")
    for name in ("reasoning_content", "tool_calls"):  # an empty one is none
        messages = [
            {k: v for k, v in m.items() if k != name or (v.strip() if isinstance(v, str) else v)} for m in messages
        ]
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"}
    return messages[0]["content"] if plain else Turns(messages)


_OF_OTHERS = ("role", "content", "name", "tool_call_id")


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls") or []
    functions: list[Any] = [None]
    if isinstance(calls, list):
        functions = [call.get("function", call) if isinstance(call, Mapping) else None for call in calls]
    if not all(isinstance(f, Mapping) and isinstance(f.get("name"), str) for f in functions):
        raise BadRow("malformed", f"tool_calls must be a list of functions with names; got {shown(calls)}")
    for f in functions:
        if not isinstance(f.get("arguments", {}), (Mapping, str)):
            got = shown(f["arguments"])
            raise BadRow("malformed", f"the arguments in tool_calls must be a dict, or JSON of one; got {got}")
    return functions


def _sided(prompt: Any, positives: Any, negatives: Any) -> Sided:
    """Responses that are on a side. All answer one prompt: the one given, or the one that their messages share."""
    prompt = prompt if prompt is None or isinstance(prompt, str) else _messages(prompt)
    answers = [*_answers(positives, prompt)]
    P = len(answers)
    answers += _answers(negatives, prompt)
    if any(other != answers[0][0] for other, _ in answers):
        answers = _from_where_they_part(answers)
    context = answers[0][0] if answers else prompt
    if context is None:
        raise BadRow("no prompt", "it has no prompt, and its responses are not conversations")
    return Sided(context, [text for _, text in answers], [i < P for i in range(len(answers))])


def _from_where_they_part(answers: list[tuple[Prompt | None, str]]) -> list[tuple[Prompt | None, str]]:
    """Conversations of several turns, as the messages that all of them begin with and what each goes on with, from a
    turn of the assistant on."""
    whole = [[*context, *messages_of(text)] if isinstance(context, list) else [] for context, text in answers]
    least = min(map(len, whole))
    same = next((i for i in range(least) if any(m[i] != whole[0][i] for m in whole)), least)
    starts = (i for i in range(min(same, least - 1), 0, -1) if _answer_begins(whole, i))
    if not (start := next(starts, 0)):
        raise BadRow("other context", "its responses do not answer the same messages")
    return [(messages[:start], _response(messages[start:])) for messages in whole]


def _answer_begins(conversations: list[list[Message]], at: int) -> bool:
    return conversations[0][at - 1].get("role") != "assistant" and all(
        messages[at].get("role") == "assistant" for messages in conversations
    )


def _pairs(row: Row) -> Sided:
    return _sided(row.get("prompt"), row["chosen"], row["rejected"])


def _sets(row: Row) -> Sided:
    return _sided(row["prompt"], row["positives"], row["negatives"])


def _alpaca(row: Row) -> Sided:
    text, more = row["instruction"], row.get("input") or ""
    for name, part in {"instruction": text, "input": more}.items():
        if not isinstance(part, str):
            raise BadRow("malformed", f"{name} must be text; got {shown(part)}")
    return _sided(_conversation(f"{text}\n{more}" if more else text), row["chosen"], row["rejected"])


def _sharegpt(row: Row) -> Sided:
    return _sided(_messages(row["conversations"]), row["chosen"], row["rejected"])


def _ms_swift(row: Row) -> Sided:
    messages = _messages(row["messages"])
    return _sided(messages[:-1], messages[-1:], row.get("rejected_messages") or row["rejected_response"])


def _ultrafeedback(row: Row, score: Callable[[Row], Any]) -> Scored:
    found = row["completions"]
    return Scored(_conversation(row["instruction"]), [c["response"] for c in found], [score(c) for c in found])


def _mean_rating(completion: Row) -> float | None:
    """The mean rating over the aspects that have one. Ratings are texts, and "N/A" stands for none."""
    ratings = [as_score(aspect["Rating"]) for aspect in completion["annotations"].values() if aspect]
    known = [r for r in ratings if r is not None]
    return statistics.fmean(known) if known else None


def _nectar(row: Row) -> Scored:
    prompt = _transcript(row["prompt"]) or _conversation(row["prompt"])
    ranks = [as_score(a["rank"]) for a in row["answers"]]
    return Scored(prompt, [a["answer"] for a in row["answers"]], [None if r is None else -r for r in ranks])


def _listed(row: Row) -> Scored:
    scores = row["all_rm_scores"] if "all_rm_scores" in row else row["scores"]
    return Scored(_conversation(row["prompt"]), row["all_generated_responses"], scores)


def _numbered(row: Row) -> Scored:
    names = sorted((c for c in row if re.fullmatch(r"response_\d+", c)), key=lambda c: int(c[9:]))
    return Scored(_conversation(row["prompt"]), [row[c] for c in names], [row.get(f"{c}_reward") for c in names])


def _single(row: Row) -> Sided:
    return _sided(row.get("prompt"), row["response"] if "response" in row else row["completion"], [])


@dataclass(frozen=True)
class Format:
    needs: tuple[str, ...]  # columns; "|" separates alternatives, [0-9] stands for a digit
    read: Callable[[Row], Sided | Scored]

    def fits(self, columns: Collection[str]) -> bool:
        return all(any(fnmatchcase(c, name) for name in need.split("|") for c in columns) for need in self.needs)


_COMPLETIONS = ("instruction", "completions")
# Formats are tried in this order. Those with scores come first, as their rows often carry pairs made from the scores.
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(_COMPLETIONS, partial(_ultrafeedback, score=itemgetter("overall_score"))),
    "ultrafeedback_fine_grained": Format(_COMPLETIONS, partial(_ultrafeedback, score=itemgetter("fine-grained_score"))),
    "ultrafeedback_annotations": Format(_COMPLETIONS, partial(_ultrafeedback, score=_mean_rating)),
    "nectar": Format(("prompt", "answers"), _nectar),
    "listed": Format(("prompt", "all_generated_responses", "all_rm_scores|scores"), _listed),
    "numbered": Format(("prompt", "response_[0-9]", "response_[0-9]_reward"), _numbered),
    "sets": Format(("prompt", "positives", "negatives"), _sets),
    "sharegpt": Format(("conversations", "chosen", "rejected"), _sharegpt),  # LLaMA-Factory
    "alpaca": Format(("instruction", "chosen", "rejected"), _alpaca),  # LLaMA-Factory
    "ms_swift": Format(("messages", "rejected_response|rejected_messages"), _ms_swift),
    "pairs": Format(("chosen", "rejected"), _pairs),  # TRL, and prompt where it is there
}

# A prompt with one response or a list of them, on no side: such rows are scored, not trained on.
SINGLE = Format(("prompt", "response|completion"), _single)


def recognise(columns: Collection[str], name: str = "auto", formats: Mapping[str, Format] = FORMATS) -> Format:
    """The format of that name, or the first whose columns are there. A ValueError says what was found and wanted."""
    one_of("format", name, ["auto", *formats])
    candidates = {n: f for n, f in formats.items() if name in ("auto", n)}
    for candidate in candidates.values():
        if candidate.fits(columns):
            return candidate
    if "label" in columns and SINGLE.fits(columns):
        raise ValueError(
            "the columns must be those of a format; a row with the label of one response, as KTO takes them, is a group"
            " with an empty side: put the good and the bad responses of a prompt in one row (positives, negatives); got"
            f" {', '.join(sorted(columns))}"
        )
    wanted = "; ".join(f"{n}: {', '.join(f.needs)}" for n, f in candidates.items())
    raise ValueError(f"the columns must be those of a format ({wanted}); got {', '.join(sorted(columns))}")


def read_responses(row: Row) -> tuple[Prompt, list[str], list[Any] | None]:
    """A prompt, its responses and its tools, in the format `SINGLE` or any other, whatever their side. None counts as
    no column.

    Raises ValueError for columns of no format, and BadRow for a row without the structure of its format.
    """
    full = {name: value for name, value in row.items() if value is not None}
    found = read(recognise(full, formats={"single": SINGLE, **FORMATS}), full)
    if found.images:
        raise BadRow("malformed", "its images are not read here: GroupDPOTrainer alone takes rows with images")
    return found.prompt, found.responses, found.tools


def read(fmt: Format, row: Row) -> Sided | Scored:
    """The content of the row. BadRow where it does not have the structure of its format."""
    try:
        found = _read(fmt, row)
        for text in _texts([found.prompt, found.tools, *map(messages_of, found.responses)]):
            _check_unicode(text)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # nested values of another form
        raise BadRow("malformed", f"not the structure of its format ({type(error).__name__}: {error})") from None
    except RecursionError:
        raise BadRow("malformed", f"its values must not be nested more than {_DEEPEST} deep") from None
    return found


def _read(fmt: Format, row: Row) -> Sided | Scored:
    found = fmt.read(row)
    if isinstance(found, Scored):
        found = found._replace(responses=_list("responses", found.responses), scores=_list("scores", found.scores))
    if len(found.responses) != len(found[2]):
        raise BadRow("malformed", f"{len(found.responses)} responses have {len(found[2])} scores")
    for text in found.responses:
        if not isinstance(text, str):
            raise BadRow("malformed", f"a response must be text; got {type(text).__name__}")
    if not (found.prompt.strip() if isinstance(found.prompt, str) else found.prompt):
        raise BadRow("no prompt", "the prompt is empty")
    if isinstance(found.prompt, list) and found.prompt[-1].get("role") == "assistant":
        raise BadRow("malformed", "a prompt must not end with a message of the assistant")
    prompt, images = _with_context(found.prompt, row), _images(row)
    there, given = 0 if isinstance(prompt, str) else places(prompt), len(images or ())
    if there not in (0, given) or (given and not any(m["role"] == "user" for m in prompt)):  # type: ignore[index]
        raise BadRow(
            "malformed", f"a prompt must have a place for each image, or a user and none; it has {there} for {given}"
        )
    return _with_weights(found._replace(prompt=prompt, tools=_tools(row), images=images), row)


def _list(what: str, values: Any, of: str = "") -> list[Any]:
    """The values as a list: a text has letters and a dict has keys, and neither are responses."""
    if hasattr(values, "tolist"):  # an array, as tables of pandas have it
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise BadRow("malformed", f"{what} must be a list{of}; got {shown(values)}")
    return [*values]


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields every text in nested values, with the names in dicts."""
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each, depth + 1)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if not isinstance(name, str):
                raise TypeError(f"the names in a dict must be text; got {shown(name)}")
            yield name
            yield from _texts(each, depth + 1)


def _check_unicode(text: str) -> None:
    """BadRow for half of a surrogate pair (an emoji cut in two), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start]
        raise BadRow(
            "malformed", f"a text has half of a surrogate pair at character {error.start}, after {near!r}"
        ) from None
