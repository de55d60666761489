"""Training on several processes, on one machine or many: torch's DistributedDataParallel, or FSDP2's `fully_shard`.

Start them with `torchrun --nproc-per-node 2 -m rwkv_lab.train …`. Every process draws the same batch and takes its own
rows of it, and every gradient is the mean over the whole batch, so the number of processes does not change the training
but for rounding. Only the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from rwkv_lab import model as models
from rwkv_lab.lazy_torch import no_grad, torch
from rwkv_lab.model.device import parse_device


@dataclass(frozen=True)
class Processes:
    """The processes that train together; one where torch.distributed was not set up.

    how: "ddp": every process holds the whole model, gradients are averaged. "fsdp": the parameters, gradients and
        optimiser are spread over the processes; a model is loaded whole by each before that.
    """

    how: str
    rank: int
    size: int

    @classmethod
    def here(cls, how: str) -> Processes:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(how, torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls(how, 0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.size > 1 and self.how == "fsdp"

    def wrap(self, model: models.RWKV_Dual) -> torch.nn.Module:
        """What to call in place of the model. `fully_shard` changes the model itself."""
        if self.size == 1:
            return model
        if self.how == "fsdp":
            from torch.distributed.fsdp import fully_shard

            # A unit is whole only while its own forward runs. `ln0` runs before its block; `time_state` is read before
            # all blocks, so with it the whole model is one unit.
            if not model.has_time_state:
                for unit in (model.get_submodule("blocks.0.ln0"), *model.blocks):
                    fully_shard(unit)
            fully_shard(model)
            return model
        device = model.get_device()
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch."""
        each = batch_size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    @contextmanager
    def collecting(self, wrapped: torch.nn.Module, last: bool) -> Iterator[None]:
        """Around the passes of one batch: gradients are exchanged in the last one of a step only."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]  # what `fully_shard` added
        ddp = wrapped if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) else None
        with nullcontext() if last or ddp is None else ddp.no_sync():
            yield

    def total(self, value: torch.Tensor) -> float:
        """The sum of a number over all processes."""
        value = value.detach().double()
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value.item()

    def whole(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors by name, those that are spread out gathered. Every process has to call it."""
        return {name: gathered(t.detach()) for name, t in tensors}

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of one that is spread over processes; any other as it is."""
    full = getattr(tensor, "full_tensor", None)  # of a DTensor
    return tensor if full is None else full()


@no_grad
def put(target: torch.Tensor, values: torch.Tensor) -> None:
    """Write a whole tensor's values into `target`, which may be spread over processes."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    target.copy_(values)


@contextmanager
def started_by_torchrun(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, where it did; yields the device of this process."""
    if "RANK" not in os.environ:
        yield device
        return
    if parse_device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()
