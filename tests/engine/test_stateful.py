"""Random programs against plain autograd: a chain of any blocks under any policies, and its plain twin, do the same.

Each rule does one thing to both, from the same random state; after each, outcomes, gradients, buffers, modes and
random state agree. Where plain autograd goes on, so do we, but for weights changed in place under a graph,
which is said in words. ABYSSAL_EXAMPLES draws more programs, other ones each time; ABYSSAL_RAW does not shrink them.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn

import abyssal
from abyssal.engine import block as engine_block
from abyssal.engine.block import LINKER
from abyssal.models.replay.call import Call
from toys.fuzzed import JOINS, KINDS, WIDTH, Chain, Nested, Pass, Told

BELOW = [abyssal.Recompute(1), abyssal.Recompute()]
EXACT = [abyssal.Store(), abyssal.Keep(), abyssal.Keep(), abyssal.Keep("cpu"), *BELOW]
SOLVED = [abyssal.Reverse(14), abyssal.Reverse(14)]
CODED = [abyssal.Code(8), abyssal.Code(8, refine=1), abyssal.Code(8, device="cpu"), abyssal.Code()]
# Policies to draw from, and how far off all of a step's gradients may be together, relative.
FAMILIES = [
    (EXACT, 0.0),
    (BELOW, 0.0),
    (EXACT + SOLVED, 1e-6),
    (SOLVED, 1e-6),
    (EXACT + SOLVED + CODED, 0.3),
    ([abyssal.Code(8)], 0.05),
]

FAULTS = st.sampled_from([Told, KeyboardInterrupt])
SMALL = st.integers(0, 1_000)
Draw = Callable[[st.SearchStrategy[Any]], Any]

NEED_GRAPHS = ("backward", "grad", "second_order", "second_run_that_fails", "change_in_place", "drop")
ACTIONS = (
    *("forward", "backward", "grad") * 3, *NEED_GRAPHS, "second_run_that_fails", "reconstruct", "release", "duplicate",
    "freeze", "replace", "switch", "zero_grad", "step", "evaluate", "forward_that_fails", "drop_all",
)  # fmt: skip


class Raised(NamedTuple):
    kind: type[BaseException]
    words: str


@dataclass(repr=False)
class Graph:
    """What one forward pass of both models left alive."""

    models: tuple[Chain, Chain]
    passes: tuple[Pass, Pass]
    bound: float
    evaluated: bool  # a BatchNorm: a later pass moves what it saw, of which plain autograd takes no note
    changed: set[str] = field(default_factory=set)  # since: "weights", "values", "statistics"


class Counted(Call):
    __slots__ = ("__weakref__",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        ALIVE.add(self)


ALIVE: weakref.WeakSet[Counted] = weakref.WeakSet()


def outcome(act: Callable[[], Any]) -> Any:
    """What it returns, or what it raised, without the frames that a traceback holds."""
    try:
        return act()
    except (Exception, KeyboardInterrupt) as error:
        return Raised(type(error), str(error))


def blocks_of(model: Chain) -> list[str]:
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    inner = [
        f"{n}.inner.{j}" for n, b in zip(names, model.blocks, strict=True) if isinstance(b, Nested) for j in (0, 1)
    ]
    return names + inner


class Twins(RuleBasedStateMachine):
    """A plain model and a reconstructed one, and the graphs that are alive of both."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[Graph] = []
        self.failed = False
        ALIVE.clear()  # of a run that failed
        self.open = len(LINKER)
        engine_block.Call = Counted  # type: ignore[misc]

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """One rule, since several would be drawn by how little they draw themselves."""
        name = data.draw(st.sampled_from(ACTIONS))
        if (not self.graphs and name in NEED_GRAPHS) or (name == "forward" and len(self.graphs) == 4):
            name = "drop" if self.graphs else "forward"
        getattr(self, name)(data.draw)

    # ------------------------------------------------------------------ models

    @initialize(
        kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=6),
        joins=st.lists(st.sampled_from(JOINS), min_size=1, max_size=6),
        again=st.lists(st.integers(0, 5), max_size=2),
        seed=SMALL,
        data=st.data(),
    )
    def build(self, kinds: list[Any], joins: list[str], again: list[int], seed: int, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        self.plain = Chain(kinds, joins, again).double()
        self.ours = copy.deepcopy(self.plain)
        self.reconstruct(data.draw)
        self.forward(data.draw)

    def reconstruct(self, draw: Draw) -> None:
        names = blocks_of(self.ours)
        if not draw(st.integers(0, 3)):
            names = [n for n in names if "inner" in n] + [n for n in names if "inner" not in n]
        else:
            names = [n for n in names if "inner" not in n]
        policies, self.bound = draw(st.sampled_from(FAMILIES))
        chosen = {name: draw(st.sampled_from(policies)) for name in names}
        abyssal.reconstruct(self.ours, chosen, blocks=names)

    def release(self, draw: Draw) -> None:
        abyssal.release(self.ours)
        self.bound = 0.0

    def duplicate(self, draw: Draw) -> None:
        how = draw(st.sampled_from(["deepcopy", "pickle"]))
        self._forget_left()  # which neither can copy
        twin = copy.deepcopy if how == "deepcopy" else (lambda model: pickle.loads(pickle.dumps(model)))
        self.plain, self.ours = twin(self.plain), twin(self.ours)

    def freeze(self, draw: Draw) -> None:
        which, needed = draw(SMALL), draw(st.booleans())
        for model in (self.plain, self.ours):
            parameters = list(model.parameters())
            if which % 3:
                parameters = list(model.blocks[which % len(model.blocks)].parameters())
            for i, p in enumerate(parameters):
                if which % 2 or i % 2:
                    p.requires_grad_(needed)

    def replace(self, draw: Draw) -> None:
        which = draw(SMALL)
        for model in (self.plain, self.ours):
            linear = model.blocks[which % len(model.blocks)].first
            linear.weight = nn.Parameter(1.01 * linear.weight.detach(), requires_grad=which % 3 > 0)

    def switch(self, draw: Draw) -> None:
        which, training = draw(SMALL), draw(st.booleans())
        for model in (self.plain, self.ours):
            (model.blocks[which % len(model.blocks)] if which % 2 else model).train(training)

    def zero_grad(self, draw: Draw) -> None:
        everything = draw(st.booleans())
        for model in (self.plain, self.ours):
            model.zero_grad(set_to_none=everything)

    def step(self, draw: Draw) -> None:
        for model in (self.plain, self.ours):
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
        for graph in self.graphs:
            if graph.models[0] is self.plain:
                graph.changed.add("weights")

    # ------------------------------------------------------------------ forward

    @contextmanager
    def same_random_state(self) -> Iterator[Callable[[], None]]:
        """Both begin from the same state and leave the same; the function given is called between them."""
        before, between = torch.get_rng_state(), []

        def next_one() -> None:
            between.append(torch.get_rng_state())
            torch.set_rng_state(before)

        yield next_one
        assert torch.equal(torch.get_rng_state(), between[0]), "other random numbers were drawn"

    def both(self, act: Callable[[int], Any]) -> tuple[Any, Any]:
        with self.same_random_state() as ours_next:
            plain = outcome(lambda: act(0))
            ours_next()
            ours = outcome(lambda: act(1))
        self.failed |= isinstance(ours, Raised)
        return plain, ours

    def _forward(self, seed: int, needed: bool, how: str = "") -> tuple[Any, Any]:
        x = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        leaves = [[t.clone().requires_grad_(needed) for t in x] for _ in range(2)]
        models = (self.plain, self.ours)

        def act(side: int) -> Pass:
            model = models[side]
            if how == "functional":
                weights = {name: (1.01 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
                return torch.func.functional_call(model, weights, (*leaves[side],))._replace(
                    weights=(*weights.values(),)
                )
            with abyssal.paused(model) if how == "paused" and side else nullcontext():
                return model(*leaves[side])

        return self.both(act)

    def forward(self, draw: Draw) -> None:
        seed, needed, how = (
            draw(SMALL),
            draw(SMALL) % 3 > 0,
            draw(st.sampled_from(["", "", "", "paused", "functional"])),
        )
        plain, ours = self._forward(seed, needed, how)
        if isinstance(plain, Raised) or isinstance(ours, Raised):
            assert plain == ours
            return
        for a, b in zip(plain.values, ours.values, strict=True):
            assert torch.equal(a, b) and a.requires_grad is b.requires_grad
        norms = [m.training for m in self.plain.modules() if isinstance(m, nn.BatchNorm1d)]
        for graph in self.graphs:
            if graph.models[0] is self.plain and graph.evaluated and any(norms):
                graph.changed.add("statistics")
        self.graphs.append(Graph((self.plain, self.ours), (plain, ours), self.bound, not all(norms)))

    def evaluate(self, draw: Draw) -> None:
        with torch.no_grad():
            plain, ours = self._forward(draw(SMALL), False)
        assert all(map(torch.equal, plain.values, ours.values))

    def forward_that_fails(self, draw: Draw) -> None:
        seed, which, fault = draw(SMALL), draw(SMALL), draw(FAULTS)
        for model in (self.plain, self.ours):
            block = model.blocks[which % len(model.blocks)]
            block.fuse, block.fault = 1, fault
        plain, ours = self._forward(seed, True)
        assert isinstance(ours, Raised) and plain == ours

    def change_in_place(self, draw: Draw) -> None:
        which, value = draw(SMALL), draw(SMALL)
        graph = self.graphs[which % len(self.graphs)]
        states = graph.passes[0].states
        i = -1 if value % 3 else value % len(states)
        for one in graph.passes:
            with torch.no_grad() if value % 2 else nullcontext():
                one.states[i].mul_(0.5)
        graph.changed.add("values")

    # ------------------------------------------------------------------ backward

    def _loss(self, graph: Graph, side: int, which: int) -> Tensor:
        values = graph.passes[side].values
        chosen = values[-1:] if which % 3 == 0 else [v for i, v in enumerate(values) if (which >> i) & 1] or values
        generator = torch.Generator().manual_seed(which)
        weights = [torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in chosen]
        return torch.stack([(w * v + 0.5 * v * v).sum() for w, v in zip(weights, chosen, strict=True)]).sum()

    def _grads(self, graphs: list[Graph], side: int) -> list[Tensor]:
        """The leaves of some graphs."""
        found = [t for g in graphs for t in (g.passes[side].x, g.passes[side].condition, *g.passes[side].weights)]
        found += [p for g in graphs for p in g.models[side].parameters()]
        return list({id(t): t for t in found}.values())

    def compare(self, graphs: list[Graph], plain: Any, ours: Any, scale: float = 1.0) -> None:
        """Outcomes of one backward pass: gradients, None where there is none, or what was raised."""
        changed = set().union(*(g.changed for g in graphs))
        if isinstance(plain, Raised):
            second = "second time" in plain.words
            may_go_on = "values" in changed and not second  # from private copies
            assert isinstance(ours, Raised) or may_go_on, f"only plain autograd refuses: {plain}"
            if not isinstance(ours, Raised):  # its graph may be used up now, where plain autograd's is not
                self.graphs = [g for g in self.graphs if all(g is not one for one in graphs)]
            return
        if isinstance(ours, Raised):
            assert "weights" in changed and "changed in place" in ours.words, ours
            return
        assert [g is None for g in plain] == [g is None for g in ours]
        pairs = [(a, b) for a, b in zip(plain, ours, strict=True) if a is not None]
        if "statistics" in changed:
            return
        bound = max(g.bound for g in graphs)
        if bound == 0.0:
            assert all(torch.equal(a, b) for a, b in pairs)
        elif pairs:
            wrong, size = (
                torch.cat([t.flatten() for t in ts]).norm() for ts in zip(*((b - a, a) for a, b in pairs), strict=True)
            )
            assert wrong <= scale * bound * size + 1e-12, float(wrong / size)

    def _chosen(self, draw: Draw) -> tuple[list[Graph], list[int]]:
        order = draw(st.lists(st.sampled_from(range(len(self.graphs))), min_size=1, max_size=3, unique=True))
        return [self.graphs[i] for i in order], [draw(SMALL) for _ in order]

    def _sum(self, graphs: list[Graph], losses: list[int], side: int) -> Tensor:
        return torch.stack([self._loss(g, side, n) for g, n in zip(graphs, losses, strict=True)]).sum()

    def backward(self, draw: Draw) -> None:
        graphs, losses = self._chosen(draw)
        retain, paused = draw(st.booleans()), draw(SMALL) % 6 == 5
        leaves = [self._grads(graphs, side) for side in range(2)]
        before = [None if t.grad is None else t.grad.clone() for t in leaves[0]]

        def act(side: int) -> Any:
            with abyssal.paused(graphs[0].models[side]) if paused and side else nullcontext():
                self._sum(graphs, losses, side).backward(retain_graph=retain)
            return [t.grad for t in leaves[side]]

        plain, ours = self.both(act)
        try:
            self.compare(graphs, plain, ours)
        finally:
            failed = isinstance(plain, Raised) or isinstance(ours, Raised)
            for a, b, old in zip(*leaves, before, strict=True):
                a.grad = old if failed else a.grad
                b.grad = None if a.grad is None else a.grad.clone()

    def grad(self, draw: Draw) -> None:
        """Of some leaves and states; perhaps with another backward pass within."""
        graphs, losses = self._chosen(draw)
        which, retain, within = draw(SMALL), draw(st.booleans()), draw(SMALL) % 3 == 2
        other = self.graphs[draw(SMALL) % len(self.graphs)]

        def act(side: int) -> Any:
            inputs = [t for g in graphs for t in (*g.passes[side].states, *self._grads([g], side)) if t.requires_grad]
            inputs = list({id(t): t for i, t in enumerate(inputs) if (which + i) % 3}.values())
            inner: list[Any] = []

            def hook(_: Tensor) -> None:
                if not inner:
                    inner.append(None)
                    leaves = [t for t in self._grads([other], side) if t.requires_grad]
                    inner[0] = outcome(
                        lambda: torch.autograd.grad(
                            self._loss(other, side, which), leaves, retain_graph=True, allow_unused=True
                        )
                    )

            total = self._sum(graphs, losses, side)
            state = graphs[0].passes[side].states[-1]
            handle = state.register_hook(hook) if within and state.requires_grad else None
            try:
                found = torch.autograd.grad(total, inputs, retain_graph=retain or within, allow_unused=True)
            finally:
                if handle is not None:
                    handle.remove()
            return found, inner

        plain, ours = self.both(act)
        ends = [p if isinstance(p, Raised) else p[0] for p in (plain, ours)]
        self.compare(graphs, *ends)
        if not isinstance(plain, Raised) and not isinstance(ours, Raised):
            for a, b in zip(plain[1], ours[1], strict=True):
                self.compare([other], a, b)

    def second_order(self, draw: Draw) -> None:
        graphs, losses = self._chosen(draw)

        def act(side: int) -> Any:
            leaves = [t for t in self._grads(graphs, side) if t.requires_grad]
            first = torch.autograd.grad(self._sum(graphs, losses, side), leaves, create_graph=True, allow_unused=True)
            penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
            return torch.autograd.grad(penalty, leaves, retain_graph=True, allow_unused=True)

        self.compare(graphs, *self.both(act), scale=10.0)

    def second_run_that_fails(self, draw: Draw) -> None:
        """Afterwards the graph is as good as before."""
        graphs, losses = self._chosen(draw)
        which, fuse, fault = draw(SMALL), draw(st.integers(1, 3)), draw(FAULTS)
        block = graphs[0].models[1].blocks[which % len(graphs[0].models[1].blocks)]

        def act(side: int) -> Any:
            leaves = [t for t in self._grads(graphs, side) if t.requires_grad]
            return torch.autograd.grad(self._sum(graphs, losses, side), leaves, retain_graph=True, allow_unused=True)

        for burning in (fuse, 0):
            block.fuse, block.fault = burning, fault
            plain, ours = self.both(act)
            if not (burning and isinstance(ours, Raised) and ours.kind is fault):
                self.compare(graphs, plain, ours)
            block.fuse = 0
            self.nothing_else_changed()

    # ------------------------------------------------------------------ ends

    def drop(self, draw: Draw) -> None:
        self.graphs.pop(draw(SMALL) % len(self.graphs))

    def drop_all(self, draw: Draw) -> None:
        self._nothing_stays()

    def _nothing_stays(self) -> None:
        self.graphs.clear()
        self._forget_left()
        if self.failed or os.environ.get("ABYSSAL_FRAME") == "torch":
            gc.collect()  # tracebacks hold frames
        # A backward pass that failed, plain autograd's too, leaves nodes in its thread's queue until the next one.
        torch.ones((), requires_grad=True).backward()
        assert not ALIVE, f"{len(ALIVE)} calls are alive without a graph"
        assert len(LINKER) <= self.open

    def _forget_left(self) -> None:
        for module in (*self.plain.modules(), *self.ours.modules()):
            if getattr(module, "left", None) is not None:
                module.left = None

    @invariant()
    def nothing_else_changed(self) -> None:
        if not hasattr(self, "ours"):
            return
        for a, b in zip(self.plain.modules(), self.ours.modules(), strict=True):
            assert a.training is b.training
            for name, buffer in a._buffers.items():
                assert torch.equal(buffer, b._buffers[name]), name
            for name, p in a._parameters.items():
                q = b._parameters[name]
                assert torch.equal(p, q) and p.requires_grad is q.requires_grad and (p.grad is None) is (q.grad is None)
            left = [getattr(m, "left", None) for m in (a, b)]
            assert (left[0] is None) is (left[1] is None)
            if left[0] is not None:
                assert torch.equal(*left) and left[0].requires_grad is left[1].requires_grad
        assert torch.is_grad_enabled()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def teardown(self) -> None:
        try:
            if hasattr(self, "ours") and sys.exc_info()[0] is None:  # not after a failure, which it would hide
                self._nothing_stays()
        finally:
            engine_block.Call = Call  # type: ignore[misc]
            self.graphs.clear()


def run(examples: int, steps: int = 20) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Twins,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize="ABYSSAL_EXAMPLES" not in os.environ,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
                database=None,
                phases=[Phase.generate] if "ABYSSAL_RAW" in os.environ else list(Phase),
            ),
        )


def test_random_programs() -> None:
    run(int(os.environ.get("ABYSSAL_EXAMPLES", "25")))


@pytest.mark.slow
def test_many_random_programs() -> None:
    run(60, steps=40)
