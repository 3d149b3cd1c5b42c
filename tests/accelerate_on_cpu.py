"""accelerate turns FSDP and DeepSpeed on for GPUs alone; with this imported its own code runs on gloo and CPUs."""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

try:
    import deepspeed.comm  # noqa: F401

    # It would compile an extension for shared memory; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
except ImportError:
    pass

_init = accelerate.state.AcceleratorState.__init__


def _with_engine(self: Any, *args: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    first = not accelerate.state.AcceleratorState._shared_state
    _init(self, *args, fsdp_plugin=fsdp_plugin, **named)
    if not first or self.distributed_type != DistributedType.MULTI_CPU:
        return
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        plugin = named.get("deepspeed_plugin") or (args[3] if len(args) > 3 else None)
        plugins = plugin if isinstance(plugin, dict) else {"default": plugin}
        for each in plugins.values():
            each.set_mixed_precision(self._mixed_precision or "no")
        next(iter(plugins.values())).select(_from_accelerator_state=True)
        self.deepspeed_plugins, self.distributed_type = plugins, DistributedType.DEEPSPEED
    accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type


accelerate.state.AcceleratorState.__init__ = _with_engine  # type: ignore[method-assign]
