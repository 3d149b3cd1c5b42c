"""Any causal language model of transformers gives its token log-probabilities here.

api.py        model_logps, attach
head_call.py  the model's own forward, with its LM head replaced for the call
probe.py      what the head computes: measured once for each model
decoder_layers.py  what a trainer asks of every layer: checkpoints, compilation
layouts.py    whether a model keeps packed sequences apart, and can share a prompt: measured once
shared_prompt.py  a prompt's keys and values, handed to its responses
limits.py     the positions and token ids that a model has room for
adapters.py   adapters of PEFT, found by what they are
"""

from .api import SharedPromptForward, attach, model_logps
from .decoder_layers import checkpoint_layers
from .layouts import why_not_left_padded, why_not_shared

__all__ = [
    "SharedPromptForward",
    "attach",
    "checkpoint_layers",
    "model_logps",
    "why_not_left_padded",
    "why_not_shared",
]
