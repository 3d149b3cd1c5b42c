"""Tiny models of text and images, with their real processors: Qwen2.5-VL, Gemma 3, SmolVLM. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from PIL import Image
from tiny_tokenizers import byte_level_bpe
from torch import nn
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


class QwenImages(transformers.Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Vision(NamedTuple):
    model: nn.Module
    processor: Any


def _tokenizer(eos: str, template: str, *special: str) -> Any:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": [*special]})
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def _spread(model: nn.Module) -> nn.Module:
    """Larger weights, so that images and words matter to the logits. Gemma's projection of images begins at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5) if parameter.any() else parameter.normal_()
    return model.eval()


def make_vision(name: str) -> Vision:
    """The same weights each time."""
    torch.manual_seed(0)
    return {"qwen2_5_vl": _qwen, "gemma3": _gemma, "smolvlm": _smolvlm}[name]()


def _qwen() -> Vision:
    special = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer("<|im_end|>", "qwen2_5_vl", *special)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids([*special])))
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    processor = QwenImages(images, tokenizer, chat_template=tokenizer.chat_template)
    return Vision(_spread(transformers.Qwen2_5_VLForConditionalGeneration(config)), processor)


def _gemma() -> Vision:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer("<end_of_turn>", "gemma3", "<start_of_turn>", *names.values())
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 3},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4, image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    processor = transformers.Gemma3Processor(
        images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4
    )
    return Vision(_spread(transformers.Gemma3ForConditionalGeneration(config)), processor)


def _smolvlm() -> Vision:
    """The processor is that of Idefics 3, which SmolVLM's checkpoints name; its own needs num2words, for videos."""
    special = ("<|im_start|>", "<fake_token_around_image>", "<global-img>", "<image>")
    tokenizer = _tokenizer("<end_of_utterance>", "smolvlm", *special)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, do_image_splitting=False
    )
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4},
        scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template
    )
    return Vision(_spread(transformers.SmolVLMForConditionalGeneration(config)), processor)
