"""Checkpoints: the state of a run in a folder, the old one or the new one, never a mixture.

A checkpoint is three files. Tensors (safetensors, named after a hash of their bytes) and `checkpoint.json`,
which holds everything else and names the others, are written anew by each save; what only grows, one entry an
epoch, is appended to a log, of which the JSON says how much counts. Replacing the JSON is the one moment at
which the checkpoint changes, so the three always belong together. A lock keeps a second run out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from mlpext._files import sweep, write_atomically

# Seconds between two saves of epochs that take less.
INTERVAL = 2.0
# What damaged or edited files make their readers raise.
DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, RuntimeError)


class Checkpoint:
    """The latest state saved in a folder, and a log.

    A state is any nest of dicts, lists, tensors, strings, numbers, bools and None; tuples come back as lists,
    keys as strings, tensors on the CPU with the same bits. An entry of the log is the same without tensors.

        checkpoint = Checkpoint("runs/digits/checkpoint")
        checkpoint.save({"model": model.state_dict()}, [{"epoch": 1}]); checkpoint.load()["log"]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._index = self.folder / "checkpoint.json"
        self._log = _Log(self.folder)
        self._lock: filelock.BaseFileLock | None = None
        self._held_back: tuple[Any, list[Any]] = None, []  # a state, and entries of the log
        self._saved = -math.inf  # when

    def exists(self) -> bool:
        """Whether the folder holds a checkpoint."""
        return self._index.exists()

    def lock(self) -> None:
        """Keep other runs out of the folder until `release`. RuntimeError where one is at work there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(f"checkpoint: another run is writing to {self.folder}") from None
        self._lock = lock

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def keep(self, state: Mapping[str, Any], entry: Any) -> None:
        """As `save`, but within INTERVAL seconds of the last one hold a copy back, for the next save or
        `flush`."""
        entries = self._held_back[1]
        entries.append(entry)
        if time.monotonic() - self._saved >= INTERVAL:
            self.save(state, entries)
        else:
            self._held_back = _copied(state), entries

    def flush(self) -> None:
        """Save what `keep` holds back."""
        if self._held_back[0] is not None:
            self.save(*self._held_back)

    def save(self, state: Mapping[str, Any], entries: Sequence[Any] = ()) -> None:
        """Replace the state, and append `entries` to the log: that of `load`, or a new one.

        Raises TypeError for a state that is no such nest, OSError.
        """
        tensors: dict[str, Tensor] = {}
        record = _without_tensors(state, "", tensors)
        content = safetensors.torch.save(tensors)
        name = f"state-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        write_atomically(self.folder / name, content)
        log = self._log.appended(entries)
        index = {"tensors": name, "log": log.record(), "state": record}
        write_atomically(self._index, json.dumps(index, indent=1))
        self._log, self._held_back, self._saved = log, (None, []), time.monotonic()
        self._sweep(name)

    def load(self) -> dict[str, Any]:
        """The saved state, and under "log" the entries of the log, which `save` then goes on with.

        Who holds the lock also removes what a killed run left. Raises FileNotFoundError without a checkpoint,
        ValueError for a damaged one.
        """
        try:
            index = json.loads(self._index.read_text())
            content = self._file(index["tensors"]).read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] not in index["tensors"]:
                raise ValueError(f"{index['tensors']} does not hold the bytes that it was saved with")
            state: dict[str, Any] = _with_tensors(index["state"], safetensors.torch.load(content))
            self._file(index["log"]["name"])
            log = _Log(self.folder, **index["log"])
            entries = log.entries()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no complete checkpoint in {self.folder}: {error}") from error
        except (*DAMAGE, safetensors.SafetensorError) as error:
            raise ValueError(f"the checkpoint in {self.folder} is damaged: {error}") from error
        self._log = log
        if self._lock is not None:
            self._sweep(index["tensors"])
        return {**state, "log": entries}

    def _sweep(self, tensors: str) -> None:
        """Remove the files of this folder that are not the checkpoint's."""
        for file in (*self.folder.glob("state-*.safetensors"), *self.folder.glob("log-*.jsonl")):
            if file.name not in (tensors, self._log.name):
                file.unlink(missing_ok=True)
        sweep(self.folder)

    def _file(self, name: str) -> Path:
        """A file of this folder, wherever its name would lead."""
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file in the folder")
        return self.folder / name


class _Log:
    """The first `size` bytes of a file of JSON lines, with their hash; without a name a new, empty file."""

    def __init__(self, folder: Path, name: str = "", size: int = 0, sha256: str = "") -> None:
        self._folder = folder
        self.name = name or f"log-{secrets.token_hex(8)}.jsonl"
        self._path = folder / self.name
        self._size, self._sha256 = size, sha256
        self._hash = hashlib.sha256()  # of the bytes, once they are read or written

    def record(self) -> dict[str, Any]:
        """What finds the log again."""
        return {"name": self.name, "size": self._size, "sha256": self._hash.hexdigest()}

    def entries(self) -> list[Any]:
        """What the log holds. ValueError where that is not what was written."""
        with open(self._path, "rb") as file:
            content = file.read(self._size)
        self._hash = hashlib.sha256(content)
        if len(content) != self._size or self._hash.hexdigest() != self._sha256:
            raise ValueError(f"{self.name} does not hold the bytes that it was saved with")
        return [json.loads(line) for line in content.splitlines()]

    def appended(self, entries: Sequence[Any]) -> _Log:
        """The log with these entries, which are on disk then; this one stays as it is."""
        content = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        with open(self._path, "ab") as file:
            file.truncate(self._size)  # an entry that no saved state knows of
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        other = _Log(self._folder, self.name, self._size + len(content))
        other._hash = self._hash.copy()
        other._hash.update(content)
        return other


def _copied(value: Any) -> Any:
    """The nest with tensors of its own."""
    if isinstance(value, dict):  # asked first: isinstance takes long to say no to a Tensor or a Mapping
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON: each tensor moves to `tensors` under its path and leaves that path in its place."""
    if isinstance(value, Tensor):
        # A copy each, because safetensors refuses tensors that share memory (tied weights).
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers and text; {path} is a {type(value).__name__}")


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"} and isinstance(value["tensor"], str):
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
