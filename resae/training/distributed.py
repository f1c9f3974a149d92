"""Several processes that train together, started by torchrun, on torch.distributed as it is.

    data     every rank holds all autoencoders and takes a share of each batch; gradients are summed
    layers   every rank holds the autoencoders of some layers and takes the whole batch of them;
             what the maps leave of the activations is exchanged, and no gradient moves

In both the language model runs on every rank, on that rank's share of the rows. Per step and rank
`data` moves 2 · L · (2MD + M + D) float32 (less as ranks are few), each parameter as soon as its
gradient is there, while the backward of the layers before it runs; `layers` moves L · N · D / ranks
before the step. Both give the weights of one process on the same batches, up to rounding.
Checkpoints and logs are written by rank 0, into a folder that all ranks see.
"""

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resae.sae.losses import Reduce, no_reduce
from resae.stack.fit import Moments


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes. Methods that communicate are collective: all ranks call them."""

    rank: int = 0
    size: int = 1
    parallelism: str = "data"
    """`data` or `layers`."""

    @classmethod
    def launched(cls, parallelism: str, device: str) -> tuple["Ranks", str]:
        """This process among those of torchrun, and its device: each rank of a node gets a GPU of
        its own. Without torchrun one process alone, and the device as it is."""
        if not dist.is_torchelastic_launched():
            return cls(parallelism=parallelism), device
        backend = "gloo"
        if device == "cuda":
            device = f"cuda:{dist.get_node_local_rank()}"  # pyright: ignore
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        elif device != "cpu":
            raise ValueError(f"device {device!r} under torchrun; give cpu, or cuda for one each")
        dist.init_process_group(backend)
        return cls(dist.get_rank(), dist.get_world_size(), parallelism), device

    @property
    def by_data(self) -> bool:
        return self.size > 1 and self.parallelism == "data"

    @property
    def by_layers(self) -> bool:
        return self.size > 1 and self.parallelism == "layers"

    def local_layers(self, n_layers: int) -> list[int]:
        """The layers of this rank."""
        return list(range(self.rank, n_layers, self.size) if self.by_layers else range(n_layers))

    # -- sums --------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over all ranks, bitwise the same on each."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    @property
    def reduce_over_batch(self) -> Reduce:
        """All-reduce of a sum over this rank's tokens to the sum over the batch."""
        return self.all_reduce if self.by_data else no_reduce

    @property
    def reduce_over_layers(self) -> Reduce:
        """All-reduce of a sum over this rank's layers to the sum over all layers."""
        return self.all_reduce if self.by_layers else no_reduce

    def all_gather_cat(self, share: Tensor) -> Tensor:
        """All-gather: `[N / ranks, …]` of this rank's tokens → `[N, …]` of the batch, in rank
        order."""
        if not self.by_data:
            return share
        parts = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(parts, share.contiguous())
        return torch.cat(parts)

    def all_reduce_min_(self, counts: Iterable[Tensor]) -> None:
        """All-reduce (minimum, in place) of tokens since a latent fired: fired on one rank is
        fired."""
        if self.by_data:
            for count in counts:
                dist.all_reduce(count, dist.ReduceOp.MIN)

    def all_reduce_moments_(self, moments: Moments) -> None:
        """All-reduce the moments over the tokens of all ranks, in place, in float64."""
        if self.size > 1:
            for tensor in (*moments.sums, moments.squares, *moments.blocks.values()):
                dist.all_reduce(tensor)
            moments.count = sum(count for (count,) in self.all_gather_ints([moments.count]))

    @contextmanager
    def summed_gradients(self, parameters: Iterable[nn.Parameter]) -> Generator[None]:
        """Context of a backward: afterwards the gradients are the sums over all ranks. Each
        gradient's all-reduce starts as soon as it has been accumulated."""
        if not self.by_data:
            yield
            return
        under_way: list[Any] = []

        def send(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
            under_way.append(dist.all_reduce(parameter.grad, async_op=True))

        hooks = [p.register_post_accumulate_grad_hook(send) for p in parameters if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for work in under_way:
            work.wait()

    # -- gather and broadcast ----------------------------------------------------------------------

    def gather_by_layer(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Gather `[N / ranks, D]` of every layer to `[N, D]` of the layers of this rank, in rank
        order."""
        under_way, received = [], []
        for layer, mine in enumerate(residuals):
            owner, parts = layer % self.size, None
            if owner == self.rank:
                parts = [torch.empty_like(mine) for _ in range(self.size)]
                received.append(parts)
            under_way.append(dist.gather(mine.contiguous(), parts, owner, async_op=True))
        for work in under_way:
            work.wait()
        return [torch.cat(parts) for parts in received]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast rank 0's tensors to every rank."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather_to_rank0(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the tensors of different layers on rank 0, on the CPU; other ranks get none."""
        held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        if not self.by_layers:
            return held if self.rank == 0 else {}
        described = [
            [name, str(t.dtype).removeprefix("torch."), *t.shape] for name, t in held.items()
        ]
        header = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        lengths = [length for (length,) in self.all_gather_ints([len(header)])]
        if self.rank > 0:
            for tensor in (header, *held.values()):
                dist.send(tensor, 0)
            return {}
        for source in range(1, self.size):
            header = torch.empty(lengths[source], dtype=torch.uint8)
            dist.recv(header, source)
            for name, dtype, *shape in json.loads(bytes(header.tolist())):
                held[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(held[name], source)
        return held

    # -- agreement ---------------------------------------------------------------------------------

    def any_rank(self, *flags: bool) -> list[bool]:
        """Logical or of each flag over the ranks. On the CPU: waits for no device."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def barrier(self) -> None:
        """Barrier."""
        self.any_rank(False)

    def all_gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """All-gather: the numbers of every rank, in rank order."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        if self.size == 1:
            return [mine.tolist()]
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine)
        return [t.tolist() for t in gathered]


SINGLE_PROCESS = Ranks()
