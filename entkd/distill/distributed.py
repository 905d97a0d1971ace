"""One process or several: the loop is the same, and so are its sums."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entkd.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as `torchrun` or `accelerate launch` started them."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join() -> World:
        """Join the launcher's process group; a world of one where there is no launcher."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return World(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, micro_batches: list[T]) -> list[T]:
        """This process's share of a step's micro-batches.

        Raises
        ------
        UserError
            If they cannot be shared out evenly: processes would wait for each other's gradients forever.
        """
        if len(micro_batches) % self.size:
            raise UserError(
                f"training: a step has {len(micro_batches)} micro-batches (blocks_per_step / micro_blocks), which "
                f"{self.size} processes cannot share evenly; change blocks_per_step or micro_blocks"
            )
        return micro_batches[self.rank :: self.size]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def sum(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor, all of one shape, summed over the processes, in one collective and without a host sync."""
        if self.size == 1:
            return terms
        stacked = torch.stack([value.float() for value in terms.values()])
        dist.all_reduce(stacked)
        return dict(zip(terms, stacked.unbind(), strict=True))

    def broadcast(self, value: T | None) -> T:
        """The leading process's value, in every process; pickled on its way. Others may give None."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0)
        return cast("T", held[0])

    def gather(self, value: T) -> list[T]:
        """The value of every process, in every process; pickled on its way."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        votes = torch.tensor(float(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes.item())
