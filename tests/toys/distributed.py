"""Toy networks, and two gloo processes that run named scenarios: what test_distributed.py is made of."""

from __future__ import annotations

import multiprocessing
import queue
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 2
DEPTH, WIDTH, BATCH = 8, 12, 6
# Each branch is h * tanh(W x) with |W| = 1/2 and h = 1/DEPTH: a fixed-point step shrinks the error by h / 2.
STEP, LIPSCHITZ = 1 / DEPTH, 0.5
REFINE = 6


def tolerance(refine: int) -> float:
    """Relative error of a gradient after `refine` fixed-point steps in each block.

    A restored state is off by at most h (hL)^k |f| / (1 - hL) per block. All blocks' errors add up, at
    most with the condition of the inverse, (1 - hL)^-DEPTH < e, and the blocks' product of Jacobians
    changes by less than h |f''| < 1/DEPTH of a state's error per block. |f| <= 1, states are about 1.
    """
    contraction = STEP * LIPSCHITZ
    return 3 * DEPTH * STEP * contraction**refine / (1 - contraction)


class Block(nn.Module):
    """x + tanh(W x) / DEPTH, with W half an orthogonal matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            nn.init.orthogonal_(self.linear.weight, gain=LIPSCHITZ)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * STEP


class Net(nn.Module):
    """An embedding, blocks, and two heads: one on the last block's output and one on a middle one's."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.middle_head = nn.Linear(WIDTH, 1)
        self.head = nn.Linear(WIDTH, 1)
        self.never = nn.Linear(WIDTH, WIDTH) if unused else None

    def forward(self, x: Tensor, skip: int | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        middle = x
        for i, block in enumerate(self.blocks):
            if i == skip:
                continue
            x = block(x)
            if i == DEPTH // 2 - 1:
                middle = x
        return self.head(x).square().mean(), self.middle_head(middle).square().mean()


def net(seed: int = 0, unused: bool = False, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net(unused).to(dtype)


def data(rank: int, step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients, whole where they are sharded, names as without DDP's `module.`."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in model.named_parameters():
        g = parameter.grad
        if g is not None:
            found[name.removeprefix("module.")] = (g.full_tensor() if isinstance(g, DTensor) else g).clone()
    return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The whole gradient's error in the Euclidean norm, relative."""
    assert found.keys() == expected.keys(), f"gradients of {found.keys() ^ expected.keys()} are missing or new"
    error = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    return (error / sum(float(expected[k].double().square().sum()) for k in expected)) ** 0.5


# ---------------------------------------------------------------------- two processes, started once


def _serve(rank: int, meeting: str, tasks: Any, answers: Any, paths: list[str]) -> None:
    sys.path[:] = paths
    torch.set_num_threads(1)
    # They meet in a file: a port that was free when it was looked for may be taken by now.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    while (task := tasks.get()) is not None:
        scenario, arguments = task
        try:
            answers.put((rank, scenario(rank, **arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Gang:
    """Two gloo processes. Starting them costs seconds, so they run one scenario after another."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._processes: list[Any] = []
        self._tasks: list[Any] = []

    def run(self, scenario: Callable[..., Any], timeout: float = 300, **arguments: Any) -> list[Any]:
        """Run `scenario(rank, **arguments)` in every process; return the answers in the ranks' order."""
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((scenario, arguments))
        got: dict[int, Any] = {}
        failed: list[str] = []
        try:
            while len(got) < RANKS and not failed:
                rank, answer, trouble = self._answers.get(timeout=timeout)
                got[rank] = answer
                if trouble:
                    failed.append(f"rank {rank}:\n{trouble}")
        except queue.Empty:
            failed.append(f"no answer within {timeout} s from ranks {set(range(RANKS)) - got.keys()}: they hang")
        if failed:  # the other rank may wait in a collective operation for good
            self.stop(kill=True)
            raise AssertionError("\n".join(failed))
        return [got[rank] for rank in range(RANKS)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._tasks = [context.Queue() for _ in range(RANKS)]
        for rank in range(RANKS):
            process = context.Process(
                target=_serve,
                args=(rank, f"{self._folder.name}/meeting", self._tasks[rank], self._answers, sys.path),
                daemon=True,
            )
            process.start()
            self._processes.append(process)

    def stop(self, kill: bool = False) -> None:
        """End the processes."""
        for process, tasks in zip(self._processes, self._tasks, strict=True):
            if kill:
                process.kill()
            else:
                tasks.put(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._processes, self._tasks = [], []
