"""Checkpoints that count only when they are whole, for trainers on transformers.Trainer.

    checkpoint-N/whole    the size and the hash of each file beside it; written last, when all is on disk

transformers writes a checkpoint file by file under its final name. A kill in the middle leaves a folder that
`resume_from_checkpoint=True` takes, for its number is the largest; where files are missing, training begins again at
step 0 on half-trained weights, or without the state of the optimizer, and says nothing. It deletes old checkpoints by
the time of day, so that a clock that went back costs the newest. Here a checkpoint without its note, or with a file
that is not what the note says, is never resumed from and never counts among those that are kept.

The module never deletes a whole checkpoint but those beyond save_total_limit, and one of the same number as is being
written. It needs a folder that all ranks see, or save_on_each_node. The cost is a hash of what was written (0.6 GB/s a
core, on up to 8 cores), once more when a run resumes; with FSDP and DeepSpeed sizes alone are noted.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import check_writable, write_json
from ..stepwise.store import file_digest, hashers
from .engines import check_checkpoint, engine_asked

NOTE = "whole"


class WholeCheckpoints:
    """A mixin of a transformers.Trainer, which comes before it."""

    args: Any
    state: Any
    accelerator: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **named: Any) -> Any:
        """Trains as transformers.Trainer does, but resumes from whole checkpoints alone: True takes the last one.

        ValueError where there is none, for a path whose checkpoint is not whole, and for a DeepSpeed checkpoint of
        another number of ranks; OSError, before the first step, where a checkpoint could not be written.
        """
        folder = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint must be False here: {folder} has no whole checkpoint; got True"
                )
        elif resume_from_checkpoint and (why := why_not_whole(Path(resume_from_checkpoint))):
            raise ValueError(
                f"resume_from_checkpoint must be a whole checkpoint, as last_checkpoint finds; got"
                f" {resume_from_checkpoint}: {why}"
            )
        check_checkpoint(self, resume_from_checkpoint)
        if self.args.should_save and self.args.save_strategy != "no":
            check_writable(folder)
        return super().train(resume_from_checkpoint, *more, **named)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        runs = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        folder, writes = runs / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.should_save
        if writes and folder.exists():  # an earlier run's: its note would vouch for files that are being written
            _remove(folder)
        self.accelerator.wait_for_everyone()
        limit = self._limit = self.args.save_total_limit
        self.args.save_total_limit = None  # transformers would go by time
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._save_beside(folder)
            self.accelerator.wait_for_everyone()
            if writes:
                _write_note(folder, hashed=engine_asked(self.args) is None)
        except Exception as error:
            if not writes:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(runs).free / 2**20
            raise OSError(
                f"checkpoint {folder} cannot be written, with {free:.0f} MiB free there: {error}; what there was of it"
                " is removed, and the checkpoints before it are as they were"
            ) from error
        finally:
            self.args.save_total_limit = limit
            del self._limit
        if writes:
            _keep(runs, limit, self.state.best_model_checkpoint)

    def _save_beside(self, folder: Path) -> None:
        """Saves what a trainer has beyond transformers' own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves as transformers does, with the arguments as they were given."""
        within = self.args.save_total_limit
        self.args.save_total_limit = getattr(self, "_limit", within)
        try:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = within


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The last whole checkpoint of an output_dir, or None: `trainer.train(resume_from_checkpoint=last_checkpoint(out))`
    begins or goes on, whatever a kill has left. It warns of each later one that it leaves out."""
    for path in reversed(_checkpoints(Path(folder))):
        why = why_not_whole(path) if (path / NOTE).exists() else "it was cut short, or another trainer wrote it"
        if not why:
            return str(path)
        warnings.warn(f"{path} is left out: {why}", stacklevel=2)
    return None


def why_not_whole(folder: Path) -> str:
    """Why a checkpoint cannot be resumed from, or "". Of one without a note, which another trainer may have written,
    the state must be readable: transformers writes it last."""
    note = folder / NOTE
    if not note.exists():
        state = folder / "trainer_state.json"
        return "" if _json(state) else f"it was cut short: {state.name} is not whole"
    try:
        files = [(folder / name, size, sha) for name, (size, sha) in _json(note)["files"].items()]
    except (TypeError, ValueError, KeyError, AttributeError):
        return f"{note.name} is damaged"
    for path, size, _ in files:
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size}" if path.is_file() else "is not there"
            return f"{path.name} must have {size} bytes; it {found}"
    with hashers() as pool:
        same = pool.map(lambda file: file[2] is None or file_digest(file[0]) == file[2], files)
        damaged = [path.name for (path, *_), fits in zip(files, same) if not fits]
    return f"{damaged[0]} is damaged: its checksum does not fit" if damaged else ""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write_note(folder: Path, hashed: bool) -> None:
    """Notes the files of a checkpoint, each of which is on disk before."""

    def of(path: Path) -> tuple[int, str | None]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size, file_digest(path) if hashed else None

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with hashers() as pool:
        noted = dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(of, paths)))
    write_json(folder / NOTE, {"files": noted})


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, in the order of their steps."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def _keep(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest whole checkpoints, so that `limit` are left; never the newest or the best."""
    noted = [path for path in _checkpoints(folder) if (path / NOTE).exists()]
    spare = [path for path in noted[:-1] if best is None or path.name != Path(best).name]
    for path in spare[: len(noted) - limit] if limit else []:
        _remove(path)


def _remove(folder: Path) -> None:
    """Removes a checkpoint, its note first: what a kill leaves of it is not taken for whole."""
    (folder / NOTE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
