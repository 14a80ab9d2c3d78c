"""Muon: momentum whose update is orthogonalised, for stacks of equally shaped matrices, shared out over workers.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). ``torch.optim.Muon`` treats
one matrix at a time; stacking the matrices of all blocks is several times faster on CPU.
"""

from __future__ import annotations

import collections

import torch
from torch import distributed

from . import precision

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Push the singular values of ``[N, R, C]`` matrices towards 1 (Newton-Schulz), in and to ``compute_dtype()``."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(precision.compute_dtype())
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Muon over 2-D parameters; a fused matrix ``[3C, C]`` or ``[2C, C]`` of an attention counts as three or two.

    Args:
        parameters: 2-D parameters, the same order on every worker.
        momentum: Nesterov momentum.
        decay: Decoupled weight decay, per unit of learning rate.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.parameters = parameters
        self.momentum = momentum
        self.decay = decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; every worker must hold the same gradients."""
        gradients = [p.grad for p in self.parameters]
        torch._foreach_lerp_(self.buffers, gradients, 1 - self.momentum)
        updates = torch._foreach_lerp(gradients, self.buffers, self.momentum)
        stacks: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = collections.defaultdict(list)
        for parameter, update in zip(self.parameters, updates, strict=True):
            rows, columns = parameter.shape
            parts = rows // columns if rows in (2 * columns, 3 * columns) else 1
            for p, u in zip(parameter.chunk(parts), update.chunk(parts), strict=True):
                stacks[p.shape].append((p, u))
        for shape, pairs in stacks.items():
            moved = _shared(torch.stack([u for _, u in pairs]))
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for (p, _), u in zip(pairs, moved, strict=True):
                p.mul_(1 - rate * self.decay).sub_(u, alpha=scale)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """The momentum buffers."""
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Restore the momentum buffers."""
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)


def _shared(stack: torch.Tensor) -> torch.Tensor:
    """Orthogonalise a stack, each worker its share."""
    if not distributed.is_initialized():
        return orthogonalise(stack)
    workers, rank = distributed.get_world_size(), distributed.get_rank()
    each = -(-len(stack) // workers)
    padded = torch.cat([stack, stack[:1].expand(each * workers - len(stack), -1, -1)])
    mine = orthogonalise(padded[rank * each : (rank + 1) * each]).contiguous()
    gathered = torch.empty_like(padded, dtype=mine.dtype)
    distributed.all_gather_into_tensor(gathered, mine)
    return gathered[: len(stack)]
