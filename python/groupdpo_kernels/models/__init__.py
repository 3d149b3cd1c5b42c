"""Any causal language model of transformers gives its token log-probabilities here.

api.py        model_logps, attach
head_call.py  the model's own forward, with its LM head replaced for the call
probe.py      what the head computes: measured once for each model
layouts.py    whether a model keeps packed sequences apart: measured once
limits.py     the positions and token ids that a model has room for
adapters.py   adapters of PEFT, found by what they are
"""

from .api import attach, checkpoint_layers, model_logps

__all__ = ["attach", "checkpoint_layers", "model_logps"]
