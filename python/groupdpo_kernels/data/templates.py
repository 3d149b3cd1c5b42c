"""Groups of texts become the texts that are tokenised: a conversation by its chat template, a plain text as it is.

A response is what the template adds to the header of an answer. One that the template changes is dropped, never scored
as another text. It needs a tokenizer with the interface of transformers, whose sandbox renders the templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from ..checks import shown
from .formats import BadRow, Group, Message, Turns, messages_of
from .images import Pictures, in_parts


class Tokens(NamedTuple):
    """The tokens of a response, and which of them are scored."""

    ids: list[int]
    scored: list[bool]

    @classmethod
    def joined(cls, pieces: Sequence[Piece], ids: Iterable[list[int]]) -> Tokens:
        found = [*zip(pieces, ids)]
        return cls([*chain(*(ids for _, ids in found))], [piece.scored for piece, ids in found for _ in ids])

    def ended(self, eos: list[int]) -> Tokens:
        """These tokens with eos at their end, unless there are none or it is there."""
        more = eos if self.ids and self.ids[-1:] != eos else []
        return Tokens(self.ids + more, self.scored + [True] * len(more))


class Piece(NamedTuple):
    """A part of a response that is tokenised by itself, as in generation, and whether it is scored."""

    text: str
    scored: bool = True


class Rendered(NamedTuple):
    group: Group  # with the responses that are rendered
    prompt: str
    responses: list[list[Piece] | Tokens]
    plain: bool  # True without a chat template
    pictures: Pictures | None = None


class Texts:
    """Turns groups into the texts that are tokenised."""

    def __init__(
        self, tokenizer: Any, chat: bool | None, options: dict[str, Any], assistant_only: bool, processor: Any
    ) -> None:
        self.tokenizer, self.chat, self.options, self.assistant_only = tokenizer, chat, options, assistant_only
        self.processor = processor  # of text and images; None without one

    def render(self, group: Group, drop: Callable[[BadRow], None]) -> Rendered:
        prompt = group.prompt
        if group.images is not None and self.processor is None:
            got = type(self.tokenizer).__name__
            raise ValueError(f"tokenizer must be a processor of images for row {group.row}, which has some; got {got}")
        if self.chat is False and not isinstance(prompt, str):
            if len(prompt) != 1 or not isinstance(prompt[0].get("content"), str):
                raise BadRow("template", f"chat=False takes one turn of text as a prompt; it has {len(prompt)} turns")
            prompt = prompt[0]["content"]
        elif self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            turns = any(isinstance(text, Turns) for text in group.responses)
            if turns or group.tools or group.images:
                what = "a response has reasoning, tool calls or several turns" if turns else "it has tools or images"
                raise BadRow("template", f"{what}, which a chat template alone can place")
            return Rendered(group, prompt, [[Piece(text)] for text in group.responses], True)
        if not self.tokenizer.chat_template:
            raise ValueError(f"tokenizer has no chat_template for the conversation of row {group.row}: set it, or chat")
        return self._from_template(prompt, group, drop)

    def _from_template(self, prompt: list[dict[str, Any]], group: Group, drop: Callable[[BadRow], None]) -> Rendered:
        options = self.options | ({} if group.tools is None else {"tools": group.tools})
        render: Callable[..., Any] = partial(self._rendered, tokenize=False, **options)
        conversations = [[*prompt, *messages_of(text)] for text in group.responses]
        if self.processor is not None:
            images = len(group.images or ())
            prompt, conversations = in_parts(prompt, images), [in_parts(each, images) for each in conversations]
        head = render(prompt, add_generation_prompt=True)
        whole = render(conversations)
        if group.tools is not None and head == render(prompt, add_generation_prompt=True, tools=None):
            raise BadRow("template", "the chat template leaves out the tools of the row")
        if not all(text.startswith(head) for text in whole):
            raise BadRow("template", "the chat template does not continue its own prompt with the response")
        answers = [self._until_eos(text[len(head) :]) for text in whole]
        kept = _told_apart(head, answers, group, drop)
        marks = _GENERATION.search(self.tokenizer.get_chat_template(options.get("chat_template"), group.tools))
        pieces: list[list[Piece] | Tokens] = []
        for i in kept:
            if len(conversations[i]) == len(prompt) + 1 or not self.assistant_only:
                pieces.append([Piece(answers[i])])
            elif marks:
                pieces.append(self._marked(head, answers[i], conversations[i], options))
            else:
                pieces.append([*self._turns(render, whole[i], head, conversations[i], len(prompt))])
        pictures = None if group.images is None else Pictures(head, group.images)
        return Rendered(group.only(kept), head, pieces, False, pictures)

    def _rendered(self, conversation: Any, **options: Any) -> Any:
        """What the chat template makes of a conversation, or of several."""
        try:
            return self.tokenizer.apply_chat_template(conversation, **options)
        except Exception as error:  # whatever a template raises on a conversation that it does not expect
            raise BadRow("template", f"the chat template refuses it: {error}") from None

    def _turns(
        self, render: Callable[..., str], whole: str, head: str, conversation: list[Message], start: int
    ) -> Iterator[Piece]:
        """Yields the response in pieces: what the template adds to the header of each turn of the assistant, scored,
        and what stands between these turns."""
        end = len(head)
        for k in range(start, len(conversation)):
            if conversation[k]["role"] != "assistant":
                continue
            before, after = render(conversation[:k], add_generation_prompt=True), render(conversation[: k + 1])
            if not (whole.startswith(before) and whole.startswith(after) and end <= len(before) < len(after)):
                raise BadRow(
                    "template",
                    f"the chat template renders message {k} of the conversation otherwise alone than in the whole; a"
                    " template with the keyword generation can say which tokens are the assistant's",
                )
            if end < len(before):
                yield Piece(whole[end : len(before)], scored=False)
            said = self._until_eos(whole[len(before) : len(after)])
            yield Piece(said)
            end = len(before) + len(said)

    def _marked(self, head: str, answer: str, conversation: list[Message], options: dict[str, Any]) -> Tokens:
        """The tokens of the response, with the template's own mask of what the assistant generates."""
        found = self._rendered(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        before, after = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in (head, head + answer))
        ids = found["input_ids"][: len(after)]
        if ids != after or ids[: len(before)] != before:
            raise BadRow(
                "template", "a token of the rendered conversation spans the end of its prompt, or of its last turn"
            )
        tokens = Tokens(ids[len(before) :], [bool(x) for x in found["assistant_masks"][len(before) : len(after)]])
        if not any(tokens.scored):
            raise BadRow("template", "the chat template marks no token of the response as generated")
        return tokens

    def _until_eos(self, text: str) -> str:
        bare = text.rstrip()
        eos = self.tokenizer.eos_token
        return bare if eos and bare.endswith(eos) else text


# The keyword by which a template marks what the assistant generates, as transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _told_apart(head: str, answers: list[str], group: Group, drop: Callable[[BadRow], None]) -> list[int]:
    """Indices of the responses that the template left intact. A template that cuts parts of an answer (its thoughts)
    would train on another answer, and two answers that it makes equal teach nothing. White space may change, and the
    start of an answer (`<think>`) may stand at the end of the prompt, `head`.
    """
    before = "".join(head.split())
    sides: dict[str, set[bool]] = {}
    for answer, side in zip(answers, group.positive):
        sides.setdefault(answer, set()).add(side)
    kept: dict[str, int] = {}
    for i, (answer, text) in enumerate(zip(answers, group.responses)):
        if len(sides[answer]) > 1 or answer in kept:
            drop(BadRow("identical after the template", f"the response {shown(text)} is rendered like another one"))
        elif lost := _left_out(before, "".join(answer.split()), messages_of(text)):
            drop(BadRow("answer changed by the template", f"{lost}; the response becomes {shown(answer)}"))
        else:
            kept[answer] = i
    return list(kept.values())


def _left_out(before: str, after: str, messages: list[Message]) -> str:
    """What the template leaves out of these messages, which follow each other in `before + after`, without white space.
    The first may begin in `before`, but must reach past it. Empty if nothing is left out."""
    whole, at = before + after, len(before)
    for k, message in enumerate(messages):
        ends = [at]
        for what, part in _parts(message):
            # Some templates (Llama 3.1) write what a tool says as JSON, in quotes.
            forms = [part, json.dumps(part, ensure_ascii=False)] if message["role"] == "tool" else [part]
            for bare in ("".join(form.split()) for form in forms):
                found = whole.find(bare, at if k else max(0, at - len(bare) + bool(bare)))
                if found >= 0:
                    ends.append(found + len(bare))
                    break
            else:
                return f"the template leaves out {what}, {shown(part)}"
        at = max(ends)
    return ""


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yields the texts of a message that a rendering of it must hold, each with its name."""
    for name in ("reasoning_content", "content"):
        if name in message:
            yield name, message[name]
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        yield "the name in tool_calls", function["name"]
        arguments = function.get("arguments", {})
        for text in [arguments] if isinstance(arguments, str) else arguments:
            yield "the arguments in tool_calls", str(text)
