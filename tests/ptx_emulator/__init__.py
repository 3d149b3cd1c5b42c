"""An emulator of PTX in NumPy: compiled kernels run on CPU tensors, without a GPU.

`emulated()` runs the project's own launchers on the code that Triton makes for sm_80 and sm_90; `Program` and `execute`
run any PTX. What is watched: bounds and alignment of every access, races in shared memory, shared memory and registers
that nothing has written, copies and products under way that are not waited for or whose memory is used again too soon,
writes that the async proxy would not see, barriers that not all reach, hangs. What is not: the machine code (the
assembler is trusted), time, orders of global memory. Clusters and tensor memory are refused by name.

`program` reads the text, `machine` runs it; `arithmetic`, `warp`, `moves`, `matrix` and `asynchronous` have the
instructions by family; `memory` watches; `launch` catches launches.
"""

from .launch import Emulation, Tensor2d, emulated, execute, reverse, shuffled
from .machine import Settings
from .memory import Findings, GlobalMemory
from .program import Program
from .types import PtxError

__all__ = [
    "Emulation",
    "Findings",
    "GlobalMemory",
    "Program",
    "PtxError",
    "Settings",
    "Tensor2d",
    "emulated",
    "execute",
    "reverse",
    "shuffled",
]
