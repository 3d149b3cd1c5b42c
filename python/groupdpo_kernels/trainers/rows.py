"""The data of `GroupDPOTrainer`: rows become tokenised groups, and groups become the batch of a step.

It never shuffles, and never drops anything without a warning that says what and why. Token ids are in memory, as int32.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import TokenGroup, collate, tokenize_groups
from ..data.formats import Report
from ..data.images import inputs_of, processor_of, repeated
from ..data.rules import merge_prompts, read_groups
from ..models.decoder_layers import COMPILED
from ..models.layouts import (
    why_not_left_padded,
    why_not_packed,
    why_not_padded,
    why_not_shared,
    why_not_shared_images,
)
from ..models.shared_prompt import REENTRANT, rotary_limit
from ..preference.groups import PreferenceGroups
from ..preference.losses import LOSSES
from ..preference.objective import Objective
from .config import GroupDPOConfig, is_reentrant
from .engines import engine_asked

logger = logging.getLogger(__name__)


class GroupRows(torch.utils.data.Dataset[tuple[TokenGroup, Tensor | None]]):
    """Tokenised groups, with the reference's log-probabilities of their responses where they are known."""

    def __init__(self, groups: Sequence[TokenGroup], ref_logps: Tensor | None = None) -> None:
        self.groups = groups
        sizes = [len(group.responses) for group in groups]
        if ref_logps is not None and ref_logps.shape != (sum(sizes),):
            raise ValueError(f"ref_logps must be (S,) = ({sum(sizes)},); got {tuple(ref_logps.shape)}")
        self.ref_logps = None if ref_logps is None else ref_logps.split(sizes)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[TokenGroup, Tensor | None]:
        return self.groups[index], None if self.ref_logps is None else self.ref_logps[index]


@dataclass(frozen=True)
class Collator:
    """Groups -> {"rows": (G,), "step": PreferenceBatch, "num_tokens": int, "weight": float, the sum of theirs} and,
    where known, "ref_logps": (S,)."""

    layout: str
    max_tokens: int | None
    max_sequences: int | None
    pad_id: int
    share_prompt: bool = False
    prompts_together: bool = True
    pad_responses: bool = True
    processor: Any = None  # of text and images, for groups with images
    share_images: bool = False
    longest_shared: int | None = None  # a step with a longer sequence does not share; None sets no limit

    def fitting(self, *models: Any) -> Collator:
        """This collator, or, with a warning, one with a layout in which these models (or None) keep sequences apart."""
        present = [model for model in models if model is not None]
        found = self
        if found.layout == "packed" and (why := next(filter(None, map(why_not_packed, present)), "")):
            warnings.warn(f"layout 'packed' becomes 'padded': {why}", stacklevel=3)
            found = replace(found, layout="padded")
        padded = found.layout == "padded" and found.max_sequences != 1
        if padded and (why := next(filter(None, map(why_not_padded, present)), "")):
            warnings.warn(f"a micro-batch is one response, without padding: {why}", stacklevel=3)
            found = replace(found, max_sequences=1)
        return found

    def sharing(self, args: Any, aux: bool, *models: Any) -> Collator:
        """This collator, or one whose prompts run once, where args.share_prompt asks for it and these models (or None)
        can. aux: whether a router's auxiliary loss counts positions.

        Raises ValueError with the reason where it is True, and warns of the reason where it is "auto".
        """
        asked = args.share_prompt
        if not asked or (asked == "auto" and (aux or args.strategy == "one_pass" or args.torch_compile)):
            return self
        reentrant = args.gradient_checkpointing and is_reentrant(args)
        why = REENTRANT if reentrant else COMPILED if args.torch_compile else ""
        present = [model for model in models if model is not None]
        why = why or next(filter(None, (why_not_shared(model, 0) for model in present)), "")
        if why and asked is True:
            raise ValueError(f"share_prompt must be 'auto' or False here: {why}; got True")
        if why:
            warnings.warn(f"a prompt runs again for each of its responses: {why}", stacklevel=3)
            return self
        limits = [limit for limit in map(rotary_limit, present) if limit is not None]
        return replace(
            self,
            share_prompt=True,
            prompts_together=not aux and not any(map(why_not_left_padded, present)),
            pad_responses=not aux,  # the loss counts positions, padding too
            longest_shared=min(limits, default=None),
        )

    def sharing_images(self, args: Any, groups: Sequence[TokenGroup], *models: Any) -> Collator:
        """This collator, or, where it shares prompts, one that shares those with images too, if these models (or None)
        can: measured on the shortest such prompt, and not under an engine. Raises ValueError and warns as `sharing`
        does."""
        pictured = [group for group in groups if group.pictures is not None]
        if not self.share_prompt or not pictured:
            return self
        group = min(pictured, key=lambda group: len(group.prompt))
        assert group.pictures is not None
        engine, inputs = engine_asked(args), inputs_of(self.processor, group.pictures)
        whys = (why_not_shared_images(m, group.prompt, partial(repeated, inputs)) for m in models if m is not None)
        if why := f"nobody has tried it under {engine}" if engine else next(filter(None, whys), ""):
            if args.share_prompt is True:
                raise ValueError(f"share_prompt must be 'auto' or False for these images: {why}; got True")
            warnings.warn(f"a prompt with images runs again for each of its responses: {why}", stacklevel=3)
            return self
        return replace(self, share_images=True)

    def __call__(
        self, items: Sequence[tuple[TokenGroup, Tensor | None]], of: PreferenceGroups | None = None
    ) -> dict[str, Any]:
        """of: as in `collate`."""
        groups, known = [group for group, _ in items], [ref for _, ref in items if ref is not None]
        fits = self.longest_shared is None or all(group.longest <= self.longest_shared for group in groups)
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "max_sequences": self.max_sequences}
        for name in ("pad_id", "prompts_together", "pad_responses", "processor", "share_images"):
            options[name] = getattr(self, name)
        return {
            "rows": torch.tensor([group.row for group in groups]),
            "step": collate(groups, self.layout, **options, share_prompt=self.share_prompt and fits, of=of),
            "weight": sum(group.weight for group in groups),
            "num_tokens": sum(len(g.prompt) * len(g.responses) + sum(map(len, g.responses)) for g in groups),
            **({"ref_logps": torch.cat(known)} if known else {}),
        }


def tokenised(
    rows: Any,
    name: str,
    processing_class: Any,
    config: GroupDPOConfig,
    objective: Objective,
    reports: MutableMapping[str, Report],
    limits: tuple[int | None, int | None] = (None, None),
) -> Any:  # GroupRows, or a dict of them
    """Rows, or a dict of rows, as groups of token ids, each checked for what a step needs.

    Args:
        rows: rows of a layout of `data.FORMATS`, or TokenGroups; GroupRows stay as they are.
        name: the name of the data in errors and in its report.
        limits: the model's positions and its number of token ids; None where there is no limit. A longer response is
            dropped like one past max_length; where the rows are TokenGroups, both raise.
    """
    if isinstance(rows, GroupRows):
        return rows
    if isinstance(rows, Mapping):
        return {
            key: tokenised(value, key, processing_class, config, objective, reports, limits)
            for key, value in rows.items()
        }
    if isinstance(rows, (str, Tensor)) or not isinstance(rows, Iterable):
        raise TypeError(f"{name}_dataset must be rows, or a list of TokenGroup; got {rows!r:.60}")
    groups = list(rows)
    report = reports[name] = Report()
    if not all(isinstance(group, TokenGroup) for group in groups):
        if processing_class is None:
            raise ValueError(f"processing_class must be given, to tokenise {name}_dataset; got None")
        _check_columns(groups, name)
        bad: dict[str, Any] = {"on_bad": config.on_bad, "report": report}
        texts = read_groups(groups, config.format, rule=config.rule, **bad)
        texts = merge_prompts(texts, **bad) if config.merge_prompts else texts
        names = ("max_length", "too_long", "chat", "template_options", "assistant_only")
        options = {option: getattr(config, option) for option in names}
        options["max_length"] = min((n for n in (config.max_length, limits[0]) if n is not None), default=None)
        groups = list(tokenize_groups(texts, processing_class, **options, **bad))
    if report.dropped:
        logger.warning("%s_dataset: %s", name, report)
    if not groups:
        raise ValueError(f"{name}_dataset must hold a group that can be used; got none:\n{report}")
    row = LOSSES[objective.loss] if isinstance(objective.loss, str) else None
    pairs = row is not None and row.pair is not None and not row.every_pair
    for group in groups:
        if group.pictures is not None and processor_of(processing_class) is None:
            got = "None" if processing_class is None else f"a {type(processing_class).__name__}"
            raise ValueError(
                f"processing_class must be a processor of images for {name}_dataset, which has some; got {got}"
            )
        _check_limits(group, name, limits)
        _check_weights(group, name, objective)
        most = config.micro_batch_tokens
        if isinstance(most, int) and group.longest > most:
            raise ValueError(f"micro_batch_tokens must be at least {group.longest}, for row {group.row}; got {most}")
        if pairs and len(group.responses) != 2:
            got = f"row {group.row} of {name}_dataset has {len(group.responses)} responses"
            larger = "all_pairs, margin, mpo and softmax take larger groups"
            raise ValueError(f"groups must be pairs for loss {objective.loss!r}; {got}; {larger}")
    return GroupRows(groups)


def _check_limits(group: TokenGroup, name: str, limits: tuple[int | None, int | None]) -> None:
    """ValueError for a group with more tokens than the model has positions, or with an id that has no embedding."""
    positions, ids = limits
    if positions is not None and group.longest > positions:
        got = f"row {group.row} has {group.longest} tokens"
        raise ValueError(f"{name}_dataset must have at most {positions} tokens, the model's positions; {got}")
    if ids is None:
        return
    for part in (group.prompt, *group.responses):
        if len(part) and not 0 <= int(part.min()) <= int(part.max()) < ids:
            wrong = int(part.max()) if int(part.max()) >= ids else int(part.min())
            raise ValueError(f"{name}_dataset must have token ids in [0, {ids}); row {group.row} has {wrong}")


def _check_weights(group: TokenGroup, name: str, objective: Objective) -> None:
    """ValueError for weights that are not positive numbers, one a response, or that the loss cannot use."""
    each = group.response_weights
    for weight in (group.weight, *(each or ())):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{name}_dataset must have positive, finite weights; row {group.row} has {weight}")
    if each is not None and len(each) != len(group.responses):
        got = f"row {group.row} has {len(each)} for {len(group.responses)}"
        raise ValueError(f"{name}_dataset must have as many response_weights as responses; {got}")
    row = LOSSES[objective.loss] if isinstance(objective.loss, str) else None
    if each is not None and row is not None and not row.weighs_responses:
        raise ValueError(
            f"{name}_dataset must have no response_weights for loss {objective.loss!r}, which does not weigh the"
            f" responses of a side: weigh the row, or take all_pairs, margin, mpo or softmax; row {group.row} has some"
        )


def _check_columns(rows: Sequence[Any], name: str) -> None:
    """ValueError for a column that TRL's trainers read, and that this one would leave out of the prompt."""
    column = "chat_template_kwargs"
    for i, row in enumerate(rows):
        if isinstance(row, Mapping) and row.get(column):
            raise ValueError(
                f"{name}_dataset must have nothing in a column {column!r} (template_options of GroupDPOConfig is for"
                f" all rows); row {i} has"
            )
