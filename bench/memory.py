"""Peak memory of one forward and backward beyond its inputs and the gradients it returns.

On a GPU: the peak of PyTorch's CUDA allocator, from which every peer allocates. On a CPU: a fresh process for each
figure, and the kernel's high-water mark of resident memory, reset once the inputs exist (VmHWM, clear_refs). That mark
sees what no hook in an allocator does: buffers of C++ code and of the matrix library. The sum of PyTorch's own
allocations, from its profiler, stands beside it as the cross-check.

Precondition on a CPU: Linux. Before the mark is reset, libraries load and threads start on a small case. malloc gives
every freed block over 64 KiB back at once, so that no freed memory hides a peak. What an implementation keeps for later
calls counts; torch.compile alone gets a whole call first, for the compiler is not what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import RANDOM, Differentiated, Step, draw
from bench.peers import maker
from groupdpo_kernels.memory.rss import forget_peak, resident, return_freed_memory
from groupdpo_kernels.testing import Case

ROOT = Path(__file__).resolve().parent.parent
MiB = 2**20


def on_cuda(step: Step) -> dict[str, float]:
    """After a first call, which leaves the library's workspace where it stays."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step.backward(step.forward())
    torch.cuda.synchronize()
    return _figures(torch.cuda.max_memory_allocated() - before, sum(x.nbytes for x in gradients))


def on_cpu(case: Case, name: str, mode: str, profile: str = RANDOM, timeout: float = 600.0) -> dict[str, float]:
    """Runs this file in a new process."""
    fields = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    request = {"case": fields, "name": name, "mode": mode, "profile": profile}
    command = [sys.executable, "-m", "bench.memory", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"the memory process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _figures(peak: int, gradients: int) -> dict[str, float]:
    return {"extra_mib": round((peak - gradients) / MiB, 1), "peak_mib": round(peak / MiB, 1)}


def _measure_here(case: Case, name: str, mode: str, profile: str) -> dict[str, float]:
    device = torch.device("cpu")
    small = case if name == "torch.compile" else replace(case, T=16, V=512)
    function = maker(name)(case, device)
    warm = Differentiated(function, draw(small, device), mode)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
        warm.backward(warm.forward())
    del warm
    step = Differentiated(function, draw(case, device, profile=profile), mode)
    return_freed_memory()
    before = resident("VmRSS")
    forget_peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients = step.backward(step.forward())
        peak = resident("VmHWM") - before
    size = sum(x.nbytes for x in gradients)
    return _figures(peak, size) | {"allocator_extra_mib": round((allocator_peak(profiled) - size) / MiB, 1)}


def allocator_peak(profile: Any) -> int:
    """Highest running sum of the CPU allocator's events."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    request["case"]["dtype"] = getattr(torch, request["case"]["dtype"])
    print(json.dumps(_measure_here(Case(**request.pop("case")), **request)))
