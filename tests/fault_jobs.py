"""The jobs that tests/faults.py kills, starves and deceives: each runs in a folder to its end, or goes on there.

A job is run(folder, say), which returns what it ends with, and kept(folder), what a reader takes for done there. It
says a name as soon as it has told its user that this is done, so `said` must be in `kept` whenever it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from tiny_cli import PREFERENCES, write_rows
from tiny_models import batch, make
from tiny_online import ONLINE, Rewards
from tiny_tokenizers import byte_level_bpe
from tiny_training import Counting
from tiny_trl import COMMON, GROUPS, PAIRS, PROMPTS, llama

from groupdpo_kernels import Objective
from groupdpo_kernels.cli import training
from groupdpo_kernels.stepwise import reference_logps, store
from groupdpo_kernels.stepwise.store import digest, file_digest, tensor_digests
from groupdpo_kernels.trainers import checkpoints, last_checkpoint

TOKENIZER = byte_level_bpe()
Say = Callable[[str], None]
Found = dict[str, Any]
TRAINED = COMMON | {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps"}
TRAINED |= {"save_steps": 1, "save_total_limit": 2, "logging_strategy": "steps"}


@dataclass(frozen=True)
class Job:
    """run and kept as above; `last`: whether only the last thing said must be there (older checkpoints are removed);
    `command`: whether signals end it with one line; `limits`: whether it can run with a limit on the size of files."""

    run: Callable[[Path, Say], Found]
    kept: Callable[[Path], dict[str, str]]
    last: bool = False
    command: bool = False
    limits: bool = True
    repeats: bool = True  # bit for bit: figures of time do not


# ----------------------------------------------------------------------------------------------------- reference, sDPO


@contextlib.contextmanager
def _told(say: Say, pattern: str, name: str, less: int = 0) -> Iterator[None]:
    """Says a name with the number that the pattern finds in what the package logs."""

    def note(text: str) -> None:
        if found := re.search(pattern, text):
            say(f"{name} {int(found[1]) - less}")

    with training.wider_log(training.Listener(note)):
        yield


CHUNKS = 10  # as often as progress is reported


def reference(folder: Path, say: Say, seed: int = 0) -> Found:
    rows = [batch(4, 13, seed=100 * seed + i) for i in range(CHUNKS * 4)]
    with _told(say, r"scored chunk (\d+)", "chunk", less=1):
        values = reference_logps(make("llama"), rows, folder, score=Counting(), count=lambda row: 4, chunk_size=4)
    return {"values": digest(values)}


def reference_kept(folder: Path) -> dict[str, str]:
    paths = folder.glob("ref-*/*.pt")
    return {f"chunk {int(path.stem)}": digest(found["values"]) for path in paths if (found := _read(path))}


def _read(path: Path) -> Any:
    try:
        return store.read(path)
    except (store.UnusableFileError, OSError):
        return None


def sdpo(folder: Path, say: Say) -> Found:
    from groupdpo_kernels.trainers import GroupDPOConfig, StepwiseDPO

    parts = [GROUPS.select([0, 1]), GROUPS.select([2, 3]), GROUPS]
    config = GroupDPOConfig(str(folder), **TRAINED | {"max_steps": 2, "save_strategy": "no"})
    with _told(say, r"stage (\d+) of \d+: done, saved", "stage"):
        run = StepwiseDPO(llama(), config, parts, TOKENIZER, objective=Objective("all_pairs", beta=0.5))
        run.train()
    return tensor_digests(run.model)


def sdpo_kept(folder: Path) -> dict[str, str]:
    paths = folder.glob("stage-*.pt")
    return {f"stage {path.name.split('-')[1]}": digest(found) for path in paths if (found := _read(path))}


# ------------------------------------------------------------------------------------------------------------- trainers


def _train(trainer: Any, say: Say) -> Found:
    with _reported(say), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    losses = [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]
    return {"weights": digest(tensor_digests(trainer.model)), "losses": losses}


@contextlib.contextmanager
def _reported(say: Say) -> Any:
    """Says each checkpoint once the trainer has it."""
    before = checkpoints.WholeCheckpoints._save_checkpoint

    def saving(self: Any, *arguments: Any) -> None:
        before(self, *arguments)
        say(f"checkpoint {self.state.global_step}")

    checkpoints.WholeCheckpoints._save_checkpoint = saving  # type: ignore[method-assign]
    try:
        yield
    finally:
        checkpoints.WholeCheckpoints._save_checkpoint = before  # type: ignore[method-assign]


def checkpoints_kept(folder: Path) -> dict[str, str]:
    """The whole checkpoints, and the model at the end."""
    found = {}
    for path in folder.rglob("checkpoint-*"):
        if (path / checkpoints.NOTE).exists() and not checkpoints.why_not_whole(path):
            files = [path / name for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")]
            found[f"checkpoint {path.name.split('-')[1]}"] = digest([file_digest(file) for file in files])
    if (folder / "model").exists():
        found["model"] = file_digest(folder / "model" / "model.safetensors")
    return found


def group(folder: Path, say: Say) -> Found:
    from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

    config = GroupDPOConfig(str(folder), precompute_ref_log_probs=True, **TRAINED)
    objective = Objective("all_pairs", beta=0.5)
    named = {"train_dataset": GROUPS, "processing_class": TOKENIZER, "objective": objective}
    return _train(GroupDPOTrainer(llama(), args=config, **named), say)


def large_checkpoints(folder: Path, say: Say) -> Found:
    """A checkpoint of 3 MB after every step, so that most of the time goes into them."""
    from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

    config = GroupDPOConfig(str(folder), **TRAINED)
    named = {"train_dataset": PAIRS, "processing_class": TOKENIZER, "objective": Objective("simpo")}
    return _train(GroupDPOTrainer(make("llama", hidden_size=128, intermediate_size=256), args=config, **named), say)


def pairs(folder: Path, say: Say) -> Found:
    import trl

    from groupdpo_kernels.trainers import DPOTrainer

    trainer = DPOTrainer(
        llama(), args=trl.DPOConfig(str(folder), **TRAINED), train_dataset=PAIRS, processing_class=TOKENIZER
    )
    return _train(trainer, say)


def online(folder: Path, say: Say) -> Found:
    """Two epochs, and a reference that moves."""
    from datasets import Dataset

    from groupdpo_kernels.trainers import OnlineGroupDPOConfig, OnlineGroupDPOTrainer

    options = ONLINE | TRAINED | {"per_device_train_batch_size": 8, "max_steps": 4}
    config = OnlineGroupDPOConfig(str(folder), **options | {"ref_sync_steps": 2, "learning_rate": 0.1, "optim": "sgd"})
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return _train(
        OnlineGroupDPOTrainer(llama(), Rewards(), config, train_dataset=rows, processing_class=TOKENIZER), say
    )


# ------------------------------------------------------------------------------------------------------------- commands


INPUTS = Path(__file__).resolve().parents[1] / "build" / "faults" / "inputs"


def prepare(place: Path = INPUTS) -> None:
    """What the commands read: a model, its tokenizer, rows."""
    make("llama").save_pretrained(place / "model")  # type: ignore[operator]
    byte_level_bpe(bos=True).save_pretrained(place / "model")
    write_rows(place / "rows.jsonl", [{"prompt": f"{i}?", "response": " Tea." * (i % 5 + 1)} for i in range(60)])
    write_rows(place / "preferences.jsonl", PREFERENCES)


def _command(*arguments: Any) -> None:
    from groupdpo_kernels.cli.app import app

    app([str(x) for x in arguments], standalone_mode=True, prog_name="groupdpo-kernels")


def _done(*arguments: Any) -> None:
    """Runs a command that must end well."""
    try:
        _command(*arguments)
    except SystemExit as end:
        if end.code:
            raise


def logps(folder: Path, say: Say) -> Found:
    from groupdpo_kernels.cli import scoring

    score, first = scoring.score_file, True

    def telling(*arguments: Any, progress: Callable[[int, int], None], **named: Any) -> Any:
        def also(done: int, total: int) -> None:
            nonlocal first
            progress(done, total)
            if not first:
                say(f"responses {done}")
            first = False

        return score(*arguments, progress=also, **named)

    scoring.score_file, out, source = telling, folder / "out.jsonl", INPUTS
    try:
        _done("logps", source / "model", source / "rows.jsonl", out, "--window", 4, "--tokens")
    finally:
        scoring.score_file = score
    return {"lines": file_digest(out)}


def logps_kept(folder: Path) -> dict[str, str]:
    """Every window up to the one that the state notes."""
    try:
        state = json.loads((folder / "out.jsonl.state.json").read_bytes())
    except FileNotFoundError:
        return {}
    lines = (folder / "out.jsonl" if (folder / "out.jsonl").exists() else folder / "out.jsonl.part").read_text()
    whole = lines.splitlines()[: state["responses"]]
    assert all(map(json.loads, whole)) and len(whole) == state["responses"], "the state counts lines that are not there"
    return {f"responses {n}": digest(whole[:n]) for n in range(4, state["responses"] + 1, 4)}


def train(folder: Path, say: Say) -> Found:
    source = INPUTS
    options = ("--loss", "all_pairs", "--lr", 0.001, "--groups-per-step", 2, "--max-steps", 4, "--save-steps", 1)
    with _reported(say):
        where = ("--model", source / "model", "--data", source / "preferences.jsonl", "--out", folder / "run")
        _done("train", *where, *options)
    report = json.loads((folder / "run" / "report.json").read_text())
    losses = [[row["step"], row["loss"]] for row in report["history"]]
    return {"model": file_digest(folder / "run" / "model" / "model.safetensors"), "losses": losses}


def train_kept(folder: Path) -> dict[str, str]:
    return checkpoints_kept(folder / "run")


class _ForkedWorker:
    """The process that measures, with its imports done: it takes the place of subprocess.Popen in memory/sweep.py."""

    def __init__(self, command: list[str], **options: Any) -> None:
        requests, answers = os.pipe(), os.pipe()
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            from groupdpo_kernels.memory import worker

            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(requests[0], 0)
            os.dup2(answers[1], 1)
            os.closerange(3, 256)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
            worker.main()
            os._exit(0)
        os.close(requests[0])
        os.close(answers[1])
        self.stdin: Any = io.TextIOWrapper(open(requests[1], "wb", 0), write_through=True)  # noqa: SIM115
        self.stdout = open(answers[0])  # noqa: SIM115

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code


def profile(folder: Path, say: Say) -> Found:
    from groupdpo_kernels.memory import sweep

    add = sweep.Figures.add

    def telling(self: Any, row: Any) -> None:
        add(self, row)
        say(_name(row))

    sweep.Figures.add, before = telling, sweep.subprocess  # type: ignore[method-assign]
    sweep.subprocess = type("forked", (), {"Popen": _ForkedWorker, "PIPE": None})  # type: ignore[assignment,misc]
    small = ("--groups", "2,4", "--tokens", 16, "--layers", 1, "--strategies", "coupled,two_pass", "--settings", "full")
    try:
        _done("profile", *small, "--seconds", 0.1, "--rounds", 3, "--device", "cpu", "--out", folder, "--resume")
    finally:
        sweep.Figures.add, sweep.subprocess = add, before  # type: ignore[method-assign,assignment]
    return {"rows": sorted(profile_kept(folder))}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['workload']['strategy']} {row['workload']['group']} {row['status']}"


def profile_kept(folder: Path) -> dict[str, str]:
    from groupdpo_kernels.memory.sweep import read_figures

    path = folder / "measured.jsonl"
    if not path.exists() or not path.stat().st_size:
        return {}
    return {_name(row): digest(row) for row in read_figures(path)[1]}


JOBS = {
    "reference cache": Job(reference, reference_kept),
    "other rows": Job(lambda folder, say: reference(folder, say, seed=1), lambda folder: {}),
    "scoring (`logps`)": Job(logps, logps_kept, command=True),
    "profile": Job(profile, profile_kept, command=True, limits=False, repeats=False),
    "checkpoints": Job(large_checkpoints, checkpoints_kept, last=True),
    "GroupDPOTrainer": Job(group, checkpoints_kept, last=True),
    "DPOTrainer": Job(pairs, checkpoints_kept, last=True),
    "OnlineGroupDPOTrainer": Job(online, checkpoints_kept, last=True),
    "StepwiseDPO": Job(sdpo, sdpo_kept),
    "`train`": Job(train, train_kept, last=True, command=True),
}

# ------------------------------------------------------------------------------------------------ a process of its own

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Order:
    """What befalls a process: a signal at its nth write, a limit on the size of a file, which kills or is an error,
    and no right to write where the mode forbids it."""

    signal: int = 0
    write: int = 0
    limit: int = 0
    deadly: bool = True
    rights: bool = True
    told: bool = False  # whether the job says, too, when it begins to compute


def begin(name: str, folder: str, notes: str, order: Order) -> None:
    """Runs a job in this process. In the folder `notes` it leaves `began`, `said`, `writes` (how many) and `result`."""
    place, beside = Path(folder), Path(notes)
    torch.set_num_threads(1)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, file in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(beside / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    # Progress bars share a semaphore with all forks of their process; a kill may leave it taken for ever.
    tqdm.tqdm.set_lock(threading.RLock())
    said = os.open(beside / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    _watch(place, beside, order)
    if order.limit:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if order.deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.limit, resource.RLIM_INFINITY))
    if not order.rights:
        give_up_rights()
    (beside / "began").touch()

    def say(what: str) -> None:
        os.write(said, f"{what}\n".encode())

    try:
        with _computing(say) if order.told else contextlib.nullcontext():
            found = JOBS[name].run(place, say)
    except BaseException:
        if order.limit:  # the error itself goes to a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        raise
    store.write(beside / "result", {"result": json.dumps(found), "modules": [*sys.modules]})


@contextlib.contextmanager
def _computing(say: Say) -> Iterator[None]:
    """Says so when rows are scored, a step is trained or something is measured."""
    from transformers import Trainer

    from groupdpo_kernels.cli import scoring
    from groupdpo_kernels.memory.sweep import Worker
    from groupdpo_kernels.stepwise.stages import _Scorer

    places = ((Trainer, "training_step"), (_Scorer, "_score_chunk"), (scoring, "_score"), (Worker, "ask"))
    before = [getattr(owner, name) for owner, name in places]

    def telling(work: Any) -> Any:
        return lambda *arguments, **named: (say("computing"), work(*arguments, **named))[1]

    for (owner, name), work in zip(places, before):
        setattr(owner, name, telling(work))
    try:
        yield
    finally:
        for (owner, name), work in zip(places, before):
            setattr(owner, name, work)


def give_up_rights() -> None:
    """From here on the modes of files hold for this process, even where it is root's: it has no capabilities."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("capset failed")


def _watch(place: Path, beside: Path, order: Order) -> None:
    """Counts what this process does to files in its folder. At the chosen one the signal comes; its time is noted."""
    count, main = 0, threading.main_thread()

    def see(event: str, arguments: Any) -> None:
        nonlocal count
        if event not in WRITES or not str(arguments[0]).startswith(str(place)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if order.write == 0:
            os.pwrite(counts, b"%d" % count, 0)
        elif count == order.write:
            os.pwrite(counts, repr(time.monotonic()).encode(), 0)
            os.kill(os.getpid(), order.signal)

    counts = os.open(beside / "writes", os.O_WRONLY | os.O_CREAT, 0o666)
    assert threading.current_thread() is main
    sys.addaudithook(see)
