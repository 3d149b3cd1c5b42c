"""Images of a prompt: places for them in its messages, and the inputs that a model of text and images takes.

A processor writes as many tokens for an image as the model makes of it, and turns pixels into tensors when a batch is
made: a data set keeps its images as they are given. It needs a processor of transformers with an image processor, and a
chat template whose messages have their content in parts.
It never opens an address of the network, or resizes an image itself. The cost is the processor's, once to count the
tokens of a prompt and once a batch; a batch holds the pixels of a group once where its prompt is shared, else once for
each of its responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = "token_type_ids"  # how the names end of what says of each token whether it is of text or of an image


class Pictures(NamedTuple):
    """The images of a prompt, and its text with their places."""

    text: str
    images: list[Any]  # what the processor takes: images of PIL, arrays, paths

    @property
    def files(self) -> list[str]:
        """The images that are paths. A digest of this record is of their bytes too."""
        return [image for image in self.images if isinstance(image, str)]


def processor_of(processing_class: Any) -> Any:
    """The processor, if this is one of text and images; None for a tokenizer."""
    return processing_class if getattr(processing_class, "image_processor", None) is not None else None


def places(messages: Sequence[dict[str, Any]]) -> int:
    """The number of images that the messages have a place for."""
    contents = [m.get("content") for m in messages]  # a call of a tool may have none
    return sum(part["type"] == "image" for parts in contents if isinstance(parts, list) for part in parts)


def in_parts(messages: Sequence[dict[str, Any]], images: int = 0) -> list[dict[str, Any]]:
    """The messages with their content in parts. Images without places stand before the text of the first user."""
    found = []
    missing = images - places(messages)
    for message in messages:
        parts = message.get("content", [])
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if message["role"] == "user":
            parts, missing = [{"type": "image"}] * missing + parts, 0
        found.append({**message, "content": parts})
    return found


def processed(processor: Any, pictures: Pictures) -> dict[str, Tensor]:
    """What the processor makes of a prompt; whatever it raises on an image that it cannot read."""
    return dict(
        processor(text=[pictures.text], images=[pictures.images], return_tensors="pt", add_special_tokens=False)
    )


def prompt_tokens(found: dict[str, Tensor]) -> list[int]:
    """The tokens of what the processor has made of a prompt.

    ValueError where it says more of each token than its kind (Mllama's cross_attention_mask): what it would say of the
    tokens of a response is not known.
    """
    p = found["input_ids"].shape[1]
    for name, x in found.items():
        known = name in ("input_ids", "attention_mask") or name.endswith(KINDS)
        if tuple(x.shape[:2]) == (1, p) and not known:
            raise ValueError(
                f"the processor must say nothing of each token but its kind ({KINDS}); got {name!r} of shape"
                f" {tuple(x.shape)} for {p} tokens"
            )
    ids: list[int] = found["input_ids"][0].tolist()
    return ids


def inputs_of(processor: Any, pictures: Pictures) -> dict[str, Tensor]:
    """What the model takes besides the tokens of the prompt: its pixels, and what kind each token (1, p) is of."""
    found = processed(processor, pictures)
    prompt_tokens(found)
    return {name: x for name, x in found.items() if name not in ("input_ids", "attention_mask")}


def pixels_made_by(processor: Any) -> dict[str, str]:
    """{"images": how the processor makes pixels}, for the keys of what depends on them; {} without a processor."""
    return {} if processor is None else {"images": processor.image_processor.to_json_string()}


def repeated(
    inputs: dict[str, Tensor],  # of one prompt
    shape: tuple[int, int],  # (B, L)
) -> dict[str, Tensor]:
    """The inputs of a prompt for B sequences of L tokens: those that begin with it, or its first L."""
    found = {}
    for name, x in inputs.items():
        if name.endswith(KINDS):  # of each token: what follows the prompt is text, kind 0
            x = torch.nn.functional.pad(x, (0, shape[1] - x.shape[1]))
        found[name] = x.repeat(shape[0], *[1] * (x.dim() - 1))
    return found


def image_key(image: Any) -> str:
    """Text that is the same for equal images, for rows of one prompt."""
    if isinstance(image, str):
        return image
    if isinstance(image, Tensor):  # its repr leaves out the middle
        image = image.numpy(force=True)
    content = image.tobytes() if hasattr(image, "tobytes") else repr(image).encode()
    kind = [str(getattr(image, name, "")) for name in ("dtype", "mode", "shape", "size")]
    if hasattr(image, "getpalette"):  # content may be indices of colours
        kind.append(str(image.getpalette()))
    return f"{kind} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
