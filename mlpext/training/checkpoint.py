"""Checkpoints: the state of a run in a folder, the old one or the new one, never a mixture.

A checkpoint is two files: the tensors (safetensors, named after a hash of their bytes) and `checkpoint.json`,
which holds everything else and names the tensors' file. Replacing the JSON is the one moment at which the
checkpoint changes, so the two always belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mlpext._files import sweep, write_atomically


class Checkpoint:
    """The latest state saved in a folder.

    A state is any nest of dicts, lists, tensors, strings, numbers, bools and None; tuples come back as lists,
    keys as strings, tensors on the CPU with the same bits.

        checkpoint = Checkpoint("runs/digits/checkpoint")
        checkpoint.save({"model": model.state_dict(), "epoch": 3}); checkpoint.load()["epoch"]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._index = self.folder / "checkpoint.json"

    def exists(self) -> bool:
        """Whether the folder holds a checkpoint."""
        return self._index.exists()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by `state`. Raises TypeError for a state that is no such nest, OSError."""
        tensors: dict[str, Tensor] = {}
        record = _without_tensors(state, "", tensors)
        content = safetensors.torch.save(tensors)
        name = f"state-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        write_atomically(self.folder / name, content)
        write_atomically(self._index, json.dumps({"tensors": name, "state": record}, indent=1))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
        sweep(self.folder)

    def load(self) -> dict[str, Any]:
        """The saved state. Raises FileNotFoundError without a checkpoint, ValueError for a damaged one."""
        try:
            index = json.loads(self._index.read_text())
            content = (self.folder / index["tensors"]).read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] not in index["tensors"]:
                raise ValueError(f"{index['tensors']} does not hold the bytes that it was saved with")
            state: dict[str, Any] = _with_tensors(index["state"], safetensors.torch.load(content))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no complete checkpoint in {self.folder}: {error}") from error
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"the checkpoint in {self.folder} is damaged: {error}") from error
        return state


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
