"""The processes that train one model together: torchrun's, through torch.distributed.

For `fit` and the PyTorch loop. Sums are taken, not means as DistributedDataParallel takes them, because the
ranks' shares of a step need not be equal; and every rank gets the same bits. With one process nothing is
sent.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _leave_group() -> None:
    """At the end of a process that joined the group here: torch's threads would outlive what they use."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """All processes of the default process group, or this one alone where there is none.

    Joins the group that torchrun's environment (RANK, WORLD_SIZE, ...) describes if the process has not done
    so: nccl for a model on CUDA, gloo otherwise. Every method but `shard` has to be called by all ranks.

        ranks = Ranks("cpu")
        mean = ranks.all_reduce(local_sum) / count
    """

    def __init__(self, device: torch.device | str) -> None:
        self.rank, self.size, self._device = 0, 1, torch.device("cpu")
        if not dist.is_available():
            return
        by_torchrun = "RANK" in os.environ and {"WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
        if by_torchrun and not dist.is_initialized():
            backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
            if backend == "nccl":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group(backend)
            atexit.register(_leave_group)
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if dist.get_backend() == "nccl":
                self._device = torch.device("cuda", torch.cuda.current_device())

    def shard(self, rows: Tensor, step: int) -> tuple[Tensor, int | list[int]]:
        """This rank's part of each `step` rows, and how many it has of each (in torch.split's terms)."""
        if self.size == 1:
            return rows, step
        parts = [part.tensor_split(self.size)[self.rank] for part in torch.split(rows, step)]
        return torch.cat(parts), [len(part) for part in parts]

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of the ranks' `values`, of the same bits on each. RuntimeError where a rank has ended."""
        if self.size == 1:
            return values
        total = values.to(self._device, copy=True)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} cannot go on, because another rank has ended; with a "
                "checkpoint, launch all ranks again with resume=True"
            ) from error
        return total.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return (
            flag if self.size == 1 else bool(self.all_reduce(torch.tensor([float(flag)], device="cpu")) > 0)
        )

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values in `tensors`."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.to(self._device).contiguous()
                dist.broadcast(values, 0)
                tensor.copy_(values)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum over the ranks; None counts as 0, and stays where all have it."""
        if self.size == 1:
            return
        parameters = list(parameters)
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        for parameter, total in self.sum_tensors(parameters, gradients).items():
            parameter.grad = total.to(parameter.dtype)

    def sum_tensors(
        self, parameters: Sequence[nn.Parameter], tensors: Mapping[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """The sum over the ranks of one tensor for each of these parameters, in float32 at least; of those
        that no rank has there is none. All ranks give the same parameters."""
        if self.size == 1 or not parameters:
            return dict(tensors)
        present = torch.tensor([p in tensors for p in parameters], device=parameters[0].device)
        parts = [tensors[p] if p in tensors else torch.zeros_like(p) for p in parameters]
        # One message, not one a parameter; flags in float32, so that 16 bits do not add up in 16 bits.
        message = self.all_reduce(
            torch.cat([present.float(), *(part.detach().reshape(-1) for part in parts)])
        )
        flags, *sums = torch.split(message, [len(parameters), *(p.numel() for p in parameters)])
        return {
            p: total.reshape(p.shape)
            for p, some, total in zip(parameters, flags.tolist(), sums, strict=True)
            if some
        }
