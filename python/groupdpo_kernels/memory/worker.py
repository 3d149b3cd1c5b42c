"""The process that measures. `python -m groupdpo_kernels.memory.worker` reads requests, a JSON line each, and answers
in the same way.

It imports what a step needs, runs nothing, and forks a process for each request: so each starts from the same clean
state, without the seconds of an import, and one that runs out of memory ends alone.

    {"kind": "memory", "workloads": [w], "device": "cpu", "limit": null}    asks for the peak of one workload
    {"kind": "time", "workloads": [w, ...], "device": "cpu", "seconds": 8, "rounds": 20}    asks for times of several

An answer is a list with one row for each workload: status "ok", "out_of_memory" (with `why`) or "failed", and figures.
Memory on a CPU is the peak resident memory of a step, less that of the process before the model, with libraries loaded
and threads started; on a GPU it is what the allocator gave out (`peak_bytes`) and took (`reserved_bytes`). A time is
that of a whole step, the optimizer included, as a user runs it: without the tracker, and with malloc unchanged.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from ..models.decoder_layers import layers_of
from .planner import track, tracker_of
from .rss import forget_peak, limit_memory, resident, return_freed_memory
from .tracker import Peak, follow_layers
from .workload import TrainingStep, Workload, config_of, workload_of

Row = dict[str, Any]
# Messages of allocators on a CPU, where running out of memory has no exception type of its own.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "bad_alloc", "Cannot allocate memory", "not enough memory", "out of memory"),
    *('torch_call_dispatcher( "aten::new_empty"', 'torch_call_dispatcher( "aten::new_zeros"'),  # from C++ ops
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


# --------------------------------------------------------------------------------------------------------------- memory


def measure_memory(workload: Workload, device: torch.device, limit: int | None) -> Row:
    """Peak bytes of the second step, when the optimizer's state is there, and what was alive at the peak.

    limit: bytes that the step may map (CPU), or the allocator may take (GPU), beyond the process before the model.
    """
    return (_cuda_memory if device.type == "cuda" else _cpu_memory)(workload, device, limit)


def _warm_up(workload: Workload, device: torch.device) -> None:
    """Loads libraries and starts threads, with a tiny model."""
    small = replace(
        workload, model="tiny", layers=1, tokens=8, prompt=min(workload.prompt, 4), group=2, positives=None, prompts=1,
        autocast=False,
    )  # fmt: skip
    step = TrainingStep(small, device)
    for _ in range(2):
        step.run()
    # Threads start with the first GEMM that is large enough for them.
    x = torch.ones(256, 256, device=device, dtype=getattr(torch, workload.dtype))
    (x @ x).sum().item()


def _cpu_memory(workload: Workload, device: torch.device, limit: int | None) -> Row:
    return_freed_memory()
    _warm_up(workload, device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    if limit is not None:
        limit_memory(limit)
    step = TrainingStep(workload, device)
    built = resident("VmRSS")
    step.run()
    forget_peak()
    phases = {"start": resident("VmRSS") - before}

    def mark(name: str) -> None:
        if name != "forward":
            phases[{"optimizer": "forward and backward", "end": "optimizer"}[name]] = resident("VmHWM") - before
            forget_peak()

    step.run(mark=mark)
    peak = max(phases.values())
    figures = {"peak_bytes": peak, "parameter_bytes": built - before, "process_bytes": before, "phases": phases}
    return figures | _breakdown(step, peak)


def _cuda_memory(workload: Workload, device: torch.device, limit: int | None) -> Row:
    if limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    _warm_up(workload, device)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    step = TrainingStep(workload, device)
    built = torch.cuda.memory_allocated(device)
    step.run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    phases = {"start": torch.cuda.memory_allocated(device) - before}

    def mark(name: str) -> None:
        if name != "forward":
            what = {"optimizer": "forward and backward", "end": "optimizer"}[name]
            phases[what] = torch.cuda.max_memory_allocated(device) - before
            reserved.append(torch.cuda.max_memory_reserved(device))
            torch.cuda.reset_peak_memory_stats(device)

    reserved: list[int] = []
    step.run(mark=mark)
    peak = max(phases.values())
    figures = {"peak_bytes": peak, "reserved_bytes": max(reserved), "parameter_bytes": built - before, "phases": phases}
    return figures | _breakdown(step, peak)


def _breakdown(step: TrainingStep, peak: int) -> Row:
    """The bytes by category of one more step, under the tracker. What was measured beyond its count is "not tracked":
    the workspace of ops and of libraries, and what an allocator holds."""
    vocabulary = int(step.model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    tracker = tracker_of(step.workload, vocabulary, step.device.type, fake=False)
    follow_layers(layers_of(step.model), tracker)
    with tracker:
        peaks = track(step, tracker)
    found: Peak = max(peaks.values(), key=lambda part: part.total)
    sums = found.by_category()
    return {"breakdown": sums | {"not tracked": peak - sum(sums.values())}, "tracked_bytes": found.total}


# ----------------------------------------------------------------------------------------------------------------- time


def measure_time(workloads: list[Workload], device: torch.device, seconds: float, rounds: int) -> list[Row]:
    """Seconds of a step of each workload, in rounds that each begin with another one, so that all see one machine.

    The workloads have one model and one optimizer, and differ in strategy and group alone. There are at least 3 rounds,
    and at most `rounds` within `seconds`. The ratio to the first workload is the median of the ratios within a round.
    """
    step = TrainingStep(workloads[0], device)
    rows: list[Row] = [{"status": "ok"} for _ in workloads]
    times: dict[int, list[float]] = {}
    for i, workload in enumerate(workloads):
        try:
            step.run(workload)  # a first step that is not timed
            times[i] = []
        except Exception as error:  # a failure is the row of its strategy; the others go on
            rows[i] = _failure(error)
            step.optimizer.zero_grad(set_to_none=True)
            gc.collect()
    began = time.monotonic()
    for r in range(rounds):
        if r >= 3 and time.monotonic() - began > seconds:
            break
        order = list(times)
        for i in order[r % len(order) :] + order[: r % len(order)] if order else []:
            times[i].append(_clock(step, workloads[i], device))
    for i, found in times.items():
        rows[i]["seconds"] = _spread(found)
        if 0 in times:
            rows[i]["ratio"] = _spread([a / b for a, b in zip(found, times[0])])
    return rows


def _clock(step: TrainingStep, workload: Workload, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step.run(workload)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q25": low, "q75": high, "min": min(values), "rounds": len(values)}


# ------------------------------------------------------------------------------------------------------------ processes


def _failure(error: BaseException) -> Row:
    status = "out_of_memory" if out_of_memory(error) else "failed"
    return {"status": status, "why": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def answer(request: dict[str, Any]) -> list[Row]:
    """Measures what a request asks for in this process, and returns its rows."""
    workloads = [workload_of(values) for values in request["workloads"]]
    device, limit = torch.device(request["device"]), request.get("limit")
    try:
        if request["kind"] == "memory":
            return [{"status": "ok", **measure_memory(workloads[0], device, limit)}]
        return measure_time(workloads, device, request["seconds"], request["rounds"])
    except Exception as error:  # whatever a model raises becomes its row
        return [_failure(error) for _ in workloads]


def _in_a_fork(request: dict[str, Any]) -> list[Row]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(answer(request)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    if text and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return json.loads(text)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        row = {"status": "out_of_memory", "why": "the process was killed, as the kernel does where memory runs out"}
    elif request.get("limit") is not None:  # C++ that cannot allocate or start a thread may abort
        row = {"status": "out_of_memory", "why": "the process ended under its memory limit"}
    else:
        row = {"status": "failed", "why": f"the process ended with status {status}"}
    return [row for _ in request["workloads"]]


def _import_for(workload: Workload) -> None:
    """Imports before the fork, once for all: this takes seconds. It runs no operation, which could start threads."""
    import torch._dynamo  # noqa: F401  the first step of an optimizer imports it
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if workload.lora_rank:
        import peft  # noqa: F401
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(workload))]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        _import_for(workload_of(request["workloads"][0]))
        print(json.dumps(_in_a_fork(request)), flush=True)


if __name__ == "__main__":
    main()
