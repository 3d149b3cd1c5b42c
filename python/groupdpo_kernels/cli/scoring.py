"""Scores the responses in a JSONL file, and writes another JSONL file that a kill at any moment cannot damage.

Responses are scored in windows of fixed size: sorted by length within a window, in micro-batches of limited tokens, and
written in their order. A window's lines are appended to `OUT.part` and synchronised; then the number of valid bytes is
noted in `OUT.state.json`, by rename. A run that was killed resumes after the last whole window and ends with the bytes
of one that was not, because windows do not depend on where it stopped. At its end `OUT.part` becomes `OUT`.

The state holds hashes of the file, the model, the tokenizer and the options; where one of them has changed, the run is
refused with its name. It holds hashes of the lines and of itself, too: where a line has changed on disk, the run is
refused. The module never drops a response silently (one that cannot be scored is a line with its reason),
and never holds the logits or all rows.
It needs one process a file (a lock ensures this) and, for equal bytes, the same number of threads.
The cost is three readings of the file, a hash of the weights, and one forward.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..checks import one_of
from ..data.batches import PreferenceBatch, TokenGroup, collate, micro_batches, tokenize_groups, tokenizer_of
from ..data.formats import BadRow, Group, Prompt, Report, read_responses
from ..files import locked, naming, synchronise_folder, write_json
from ..models.api import SharedPromptForward
from ..models.layouts import why_not_left_padded, why_not_padded, why_not_shared
from ..models.limits import position_limit, token_limit
from ..models.shared_prompt import rotary_limit
from ..preference.group_backward import forward_parts
from ..preference.groups import PreferenceGroups
from ..stepwise.store import description, digest, file_digest, tensor_digests
from .loading import jsonl, tokenizer_digest


@dataclass(frozen=True)
class ScoringOptions:
    """Options that decide the lines that are written.

    Args:
        max_length: the most tokens of a prompt with its response; no limit by default.
        too_long: what to do with longer ones: skip, which writes the reason, or truncate_prompt, which cuts the left of
            the prompt.
        max_tokens: the most tokens of a micro-batch, padding included; a longer response has its own.
        window: how many responses are sorted by length and written together, which is what a kill can cost.
        token_logps: whether to write the log-probability of each token, too.
        chat: whether to take text prompts as a user's turn, or else conversations of one turn as plain text; by default
            each stays as it is.
        add_eos: whether plain text ends with the tokenizer's end-of-text token.
        share_prompt: whether the prompt of several responses of a window runs once, where the model can.
        on_bad: what to do with a row without the structure of its format: error, or drop, which writes the reason.
    """

    max_length: int | None = None
    too_long: str = "skip"
    max_tokens: int = 8192
    window: int = 256
    token_logps: bool = False
    chat: bool | None = None
    add_eos: bool = True
    share_prompt: bool = True
    on_bad: str = "error"

    def __post_init__(self) -> None:
        one_of("on_bad", self.on_bad, ("error", "drop"))
        one_of("too_long", self.too_long, ("skip", "truncate_prompt"))
        for name, least in {"max_length": 2, "max_tokens": 1, "window": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")


class Response(NamedTuple):
    row: int  # its number in the file, from 0, without empty lines
    place: int  # its number in its row, from 0
    prompt: Prompt
    text: str
    bad: str = ""  # why its row cannot be read
    tools: list[Any] | None = None


class Summary(NamedTuple):
    responses: int
    skipped: int
    resumed_at: int  # number of responses that an earlier run had written


def read(path: Path, on_bad: str = "error") -> Iterator[Response]:
    """Yields the responses of a file in order. A ValueError names a row with unknown columns, or with a wrong content;
    with on_bad="drop" the latter is yielded as a response without a text.
    """
    for i, row in enumerate(jsonl(path)):
        try:
            prompt, responses, tools = read_responses(row)
            if not responses:
                raise BadRow("malformed", "it has no response")
        except BadRow as bad:
            if on_bad == "drop":
                yield Response(i, 0, "", "", f"{bad.reason}: {bad}")
                continue
            raise ValueError(f"{path}, row {i}: {bad} (--on-bad drop goes on without such rows)") from None
        except ValueError as error:
            raise ValueError(f"{path}, row {i}: {error}") from None
        for k, text in enumerate(responses):
            yield Response(i, k, prompt, text, tools=tools)


def score_file(
    model: Any,
    tokenizer: Any,
    source: Path,
    target: Path,
    options: ScoringOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Scores `source` into `target`, and resumes an earlier call. A line has row, response, logp, num_tokens, and
    token_logps where asked for; or a logp of null, and the reason in `skipped`.

    Args:
        overwrite: whether to begin again even if the target or a part of it exists.
        progress: a function that is called with the number of responses done and with their total.

    Raises ValueError for a wrong row or option, for a run that was begun with other input or options, and for a
    log-probability that is not finite, naming the row; FileExistsError for a target that no run wrote.
    """
    tokenizer = tokenizer_of(tokenizer)
    total = sum(1 for _ in read(source, options.on_bad))
    if not total:
        raise ValueError(f"{source} must hold at least one row; it is empty")
    with _Output(target, _identity(model, tokenizer, source, options), overwrite) as output:
        progress(output.responses, total)
        resumed_at = output.responses
        pending = itertools.islice(read(source, options.on_bad), resumed_at, None)
        while window := list(itertools.islice(pending, options.window)):
            lines = _score(model, tokenizer, window, options)
            output.append([json.dumps(line, allow_nan=False) for line in lines], sum("skipped" in x for x in lines))
            progress(output.responses, total)
        output.finish()
        return Summary(output.responses, output.skipped, resumed_at)


def _identity(model: Any, tokenizer: Any, source: Path, options: ScoringOptions) -> dict[str, Any]:
    """All that the lines depend on, by names for error messages: readable values come first, then hashes."""
    parameter = next(model.parameters())
    return {
        **asdict(options),
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "groupdpo_kernels": __version__,
        "input": file_digest(source),
        "tokenizer": tokenizer_digest(tokenizer),
        "model": digest([description(model), tensor_digests(model)]),
    }


# ----------------------------------------------------------------------------------------------------------- one window


class _Reasons(Report):
    """A report that keeps the reason of each dropped response, by row."""

    def __init__(self) -> None:
        super().__init__()
        self.by_row: dict[int, str] = {}

    def drop(self, bad: BadRow, row: int, on_bad: str = "drop") -> None:
        super().drop(bad, row, on_bad)
        self.by_row[row] = f"{bad.reason}: {bad}"


def _score(model: Any, tokenizer: Any, window: list[Response], options: ScoringOptions) -> list[dict[str, Any]]:
    """A line for each response, in order."""
    reasons = _Reasons()
    reasons.by_row = {at: response.bad for at, response in enumerate(window) if response.bad}
    groups = (Group(r.prompt, [r.text], [True], at, tools=r.tools) for at, r in enumerate(window) if not r.bad)
    found = tokenize_groups(
        groups,
        tokenizer,
        max_length=min((n for n in (options.max_length, position_limit(model)) if n is not None), default=None),
        too_long="drop" if options.too_long == "skip" else options.too_long,
        chat=options.chat,
        add_eos=options.add_eos,
        both_sides=False,
        report=reasons,
    )
    known = (group for group in found if _has_embeddings(group, token_limit(model), reasons))
    longest_first = sorted(known, key=lambda group: -_length(group))
    by_place = _token_logps(model, longest_first, options)
    return [_line(response, by_place.get(at), reasons.by_row, at, options) for at, response in enumerate(window)]


def _has_embeddings(group: TokenGroup, rows: int | None, reasons: Report) -> bool:
    """Whether the model has an embedding of each token id; if not, the group is reported as dropped."""
    largest = max(int(part.max()) for part in (group.prompt, *group.responses))
    if rows is None or largest < rows:
        return True
    reasons.drop(BadRow("unknown token", f"token id {largest} has no embedding; the model has {rows}"), group.row)
    return False


def _length(group: TokenGroup) -> int:
    return len(group.prompt) + len(group.responses[0])


@torch.no_grad()
def _token_logps(model: Any, groups: list[TokenGroup], options: ScoringOptions) -> dict[int, Tensor]:
    """The token log-probabilities (n,) of each response, on the CPU, by its group's row."""
    together: dict[tuple[int, ...], list[TokenGroup]] = {}
    why = why_not_shared(model, 0) if options.share_prompt else ""
    if why:
        warnings.warn(f"a prompt runs again for each of its responses: {why}", stacklevel=2)
    longest = min(options.max_tokens, rotary_limit(model) or options.max_tokens)
    for group in groups if options.share_prompt and not why else ():
        if group.longest <= longest:
            together.setdefault(tuple(group.prompt.tolist()), []).append(group)
    several = [same for same in together.values() if len(same) > 1 and len(same[0].prompt) > 1]
    shared = {group.row for same in several for group in same}
    alone = [group for group in groups if group.row not in shared]
    forward, device = SharedPromptForward(model), next(model.parameters()).device
    found: dict[int, Tensor] = {}
    for parts, rows in ((_shared(model, several, options), several), (_apart(model, alone, options), [alone])):
        order = [group.row for same in rows for group in same]
        if parts:
            moved = PreferenceBatch(parts, PreferenceGroups.pairs(1), torch.arange(2)).to(device).parts
            logps, cu_seqlens, _ = forward_parts(moved, forward)
            found |= zip(order, logps.cpu().split(cu_seqlens.diff().tolist()))
    return found


def _shared(model: Any, several: list[list[TokenGroup]], options: ScoringOptions) -> list[Any]:
    """The parts of responses that share their prompts."""
    sides = [[k > 0 for k in range(len(same))] for same in several]  # of no account
    joined = [
        same[0]._replace(
            responses=[group.responses[0] for group in same],
            positive=side,
            scored=[group.scored_of(0) for group in same],
        )
        for same, side in zip(several, sides)
    ]
    together = not why_not_left_padded(model)
    limits: dict[str, Any] = {"max_tokens": options.max_tokens, "prompts_together": together}
    return collate(joined, **limits, share_prompt=True).parts if joined else []


def _apart(model: Any, groups: list[TokenGroup], options: ScoringOptions) -> list[Any]:
    """The micro-batches of whole sequences."""
    sequences = [(group.prompt, group.responses[0], group.scored_of(0)) for group in groups]
    if not sequences:
        return []
    most = None
    if why := why_not_padded(model):
        warnings.warn(f"each response is scored by itself, without padding: {why}", stacklevel=2)
        most = 1
    return [*micro_batches(sequences, max_tokens=options.max_tokens, max_sequences=most)]


def _line(
    response: Response, logps: Tensor | None, reasons: dict[int, str], at: int, options: ScoringOptions
) -> dict[str, Any]:
    line: dict[str, Any] = {"row": response.row, "response": response.place}
    if logps is None:
        return line | {"logp": None, "num_tokens": None, "skipped": reasons[at]}
    # Nine digits identify a float32 number, so that the text is short; the sum is in float64.
    tokens = [float(f"{x:.9g}") for x in logps.tolist()]
    total = math.fsum(tokens)
    if not math.isfinite(total):
        raise ValueError(f"row {response.row}, response {response.place}: its log-probability is {total}")
    line |= {"logp": total, "num_tokens": len(tokens)}
    return line | {"token_logps": tokens} if options.token_logps else line


# ------------------------------------------------------------------------------------------------------------- the file


class _Output:
    """The files OUT.part and OUT.state.json, and OUT at the end."""

    def __init__(self, target: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.target, self.identity = target, identity
        self.part, self.state = (target.with_name(target.name + end) for end in (".part", ".state.json"))
        self.responses = self.skipped = self.bytes = 0
        self.sha = hashlib.blake2b(digest_size=32)  # of the lines
        self.done = False
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file = locked(self.part, target)
        try:
            if not overwrite:
                self._take_over()
            self.file.truncate(0 if self.done else self.bytes)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        if self.part.exists() and not self.part.stat().st_size:
            self.part.unlink()
        with contextlib.suppress(OSError):  # what could not be written once; the state does not count it
            self.file.close()

    def append(self, lines: list[str], skipped: int) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        with naming(self.part):
            self.file.write(content)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.sha.update(content)
        self.responses += len(lines)
        self.skipped += skipped
        self.bytes = self.file.tell()
        self._note()

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self._note()
            os.replace(self.part, self.target)
            synchronise_folder(self.target.parent)

    def _note(self) -> None:
        counts = {"responses": self.responses, "skipped": self.skipped, "bytes": self.bytes}
        known = {"done": self.done, **counts, "lines": self.sha.hexdigest(), "identity": self.identity}
        write_json(self.state, known | {"checksum": digest(known)})

    def _take_over(self) -> None:
        """Takes over the lines of an earlier run of the same input, model and options; they are counted anew."""
        begin_again = "give another name, or --overwrite to begin again"
        if not self.state.exists():
            if self.target.exists():
                raise FileExistsError(f"{self.target} is there, and no run wrote it: {begin_again}")
            return
        try:
            known = json.loads(self.state.read_bytes())
            if known.pop("checksum") != digest(known):
                raise ValueError
            begun, finished = dict(known["identity"]), bool(known["done"])
            responses, skipped, size = (int(known[name]) for name in ("responses", "skipped", "bytes"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.state} must be the state of a run; it is not: {begin_again}") from None
        for name, now in self.identity.items():
            if (was := begun.get(name)) != now:
                hashed = name in ("input", "model", "tokenizer")
                what = f"the {name} has changed" if hashed else f"{name} was {was} and is {now}"
                if name == "tokenizer":
                    what += ", or what its chat template writes: does it print the date?"
                raise ValueError(f"{self.target} was begun otherwise: {what}; {begin_again}")
        self.done = finished and self.target.exists()  # without the target, the run was killed before the rename
        lines = self.target if self.done else self.part
        there = lines.stat().st_size
        if there < size or (self.done and there > size):
            raise ValueError(f"{self.target} must have {size} bytes of the earlier run; it has {there}: {begin_again}")
        with naming(lines), open(lines, "rb") as file:
            left = size
            while block := file.read(min(2**20, left)):
                self.sha.update(block)
                left -= len(block)
        if self.sha.hexdigest() != known["lines"]:
            raise ValueError(f"{lines} must have the lines of the earlier run; they were changed: {begin_again}")
        self.responses, self.skipped, self.bytes = responses, skipped, size
