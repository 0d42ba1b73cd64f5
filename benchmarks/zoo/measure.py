"""One training step of a model: plain, twice; in bfloat16; with every block's input kept; with the default policy.

What is compared is what a step leaves behind: the loss, the gradients, the buffers; and what a released model does.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import abyssal

LIFTED = 2.0  # how much larger untrained weights are made, so that blocks do something
NUDGE = 0.02


@dataclass
class Subject:
    """A model and what it is trained on for a step.

    Attributes:
        model: in training mode, float32.
        batch: arguments of its forward pass by name.
        kind: what it is for, in a word or two.
        recipe: how it was made, for the next time.
        plain: the step that showed that it runs.
    """

    model: nn.Module
    batch: dict[str, Any]
    kind: str
    recipe: dict[str, Any]
    plain: Step


@dataclass
class Step:
    """What a step left behind."""

    loss: float
    labelled: bool  # whether the model told the loss itself
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    warnings: list[str] = field(default_factory=list)

    @property
    def norm(self) -> float:
        return sum(_norm(g) ** 2 for g in self.gradients.values() if g is not None) ** 0.5


def lift(model: nn.Module) -> None:
    """Make untrained blocks count: zeros and ones are nudged, small weights are made larger."""
    generator = torch.Generator().manual_seed(5)
    noise = lambda p: torch.randn(p.shape, generator=generator) * NUDGE  # noqa: E731
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            if not torch.isfinite(p).all():
                p.copy_(noise(p))
            if p.numel() > 1 and (p == 0).all() and not re.search("A_log|dt_|inv_freq", name):
                p.add_(noise(p))
            elif p.dim() >= 2 and not re.search("embed|A_log|norm|position|pos_|inv_freq", name):
                if p.std() < 0.3:
                    p.mul_(LIFTED)
            elif p.dim() == 1 and p.numel() > 1 and p.std() == 0:
                p.add_(noise(p))


def step(model: nn.Module, batch: dict[str, Any], bf16: bool = False) -> Step:
    """Do a forward and a backward pass from fixed seeds, and put the buffers back as they were."""
    model.train().zero_grad(set_to_none=True)
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    inputs = {name: copy.deepcopy(value) for name, value in batch.items()}
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            output = model(**inputs)
            loss, labelled = _loss(output, any(name in batch for name in ("labels", "return_loss", "mask_labels")))
        loss.backward()
    gradients = {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape and not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
    told = [f"{w.category.__name__}: {str(w.message)[:300]}" for w in caught]
    return Step(loss.item(), labelled, gradients, buffers, told)


def _loss(output: Any, labelled: bool) -> tuple[Tensor, bool]:
    """Return the model's own loss if it has one; else random weights times all that can be differentiated."""
    loss = output.get("loss") if isinstance(output, dict) else None
    if labelled and isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum(), True
    if isinstance(output, dict):
        output = {name: value for name, value in output.items() if name != "loss"}
    total: Tensor | None = None
    for i, tensor in enumerate(_outputs(output)):
        weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i + 17))
        finite = torch.nan_to_num(tensor.float(), posinf=0, neginf=0)
        part = (finite * weights).sum() / max(1, tensor.numel()) ** 0.5
        total = part if total is None else total + part
    if total is None:
        raise RuntimeError("no output that can be differentiated")
    return total, False


def _outputs(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield torch.view_as_real(output) if output.is_complex() else output
    elif isinstance(output, dict):
        for name, value in output.items():
            if "past" not in str(name) and "cache" not in str(name):
                yield from _outputs(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _outputs(value)


def _norm(x: Tensor) -> float:
    x = x.to_dense() if x.is_sparse else x
    return torch.linalg.vector_norm(x, dtype=torch.complex128 if x.is_complex() else torch.float64).item()


def difference(found: Step, true: Step) -> dict[str, Any]:
    """How far a step's traces are from the true ones.

    Returns:
        `error`: of all gradients together, relative; `missing`: parameters that have a gradient in one step only;
        `loss`: relative; `buffers`: those that differ.
    """
    squares, missing = 0.0, []
    for name, gradient in true.gradients.items():
        other = found.gradients.get(name)
        if (gradient is None) != (other is None):
            missing.append(name)
        elif gradient is not None and other is not None and not torch.equal(gradient, other):
            squares += _norm(other - gradient) ** 2
    differ = [n for n, b in true.buffers.items() if n not in found.buffers or not _same(b, found.buffers[n])]
    return {
        "error": squares**0.5 / true.norm if true.norm else float(squares > 0),
        "missing": missing[:5] + ([f"{len(missing) - 5} more"] if len(missing) > 5 else []),
        "loss": abs(found.loss - true.loss) / max(abs(true.loss), 1e-30),
        "buffers": differ[:5],
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def runs(subject_step: Callable[[], Step]) -> Step:
    """Do a first step and hold that it can be compared with."""
    found = subject_step()
    if not np.isfinite(found.loss) or not np.isfinite(found.norm) or found.norm == 0:
        raise RuntimeError(f"loss {found.loss}, norm of the gradient {found.norm}")
    return found


def measure(subject: Subject, report: Callable[[dict[str, Any]], None]) -> None:
    """Measure one model, and report all that is known so far after each part."""
    model, batch, plain = subject.model, subject.batch, subject.plain
    row: dict[str, Any] = {
        "kind": subject.kind,
        "recipe": subject.recipe,
        "parameters": sum(p.numel() for p in model.parameters()),
        "own_loss": plain.labelled,
    }
    report(row)
    try:
        row["blocks"] = dict(Counter(_family(*found) for found in abyssal.find_blocks(model).items()))
    except abyssal.NoBlocksError as error:
        row["no_blocks"] = _shortened(str(error))
        report(row)
        return
    except Exception as error:
        row["find_blocks"] = _raised(error)
    row["repeat"] = difference(step(model, batch), plain)["error"]
    with contextlib.suppress(Exception):  # some cannot be run in bfloat16
        row["bf16"] = difference(step(model, batch, bf16=True), plain)["error"]
    report(row)
    before = _attributes(model)
    # The default looks around in its first step; the second is what training is made of.
    for name, steps, arguments in (("keep", 1, {"policy": abyssal.Keep()}), ("default", 2, {})):
        row[name] = _reconstructed(model, batch, plain, steps, arguments)
        report(row)
    left = sorted(_attributes(model) ^ before)
    after = difference(step(model, batch), plain)
    row["released"] = {"error": after["error"], "left": [" ".join(attribute) for attribute in left[:3]]}
    report(row)


def _reconstructed(
    model: nn.Module, batch: dict[str, Any], plain: Step, steps: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Take steps of the reconstructed model, and release it."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            abyssal.reconstruct(model, **arguments)
        told = [f"{w.category.__name__}: {str(w.message)[:300]}" for w in caught]
        errors = []
        for _ in range(steps):
            found = step(model, batch)
            told += found.warnings
            errors.append(difference(found, plain))
        row = errors[-1] | _certified(abyssal.certificate(model)) | {"loss": max(error["loss"] for error in errors)}
        row |= {key: list(dict.fromkeys(n for e in errors for n in e[key])) for key in ("missing", "buffers")}
        if steps > 1:
            row["first_error"] = errors[0]["error"]
        row["warnings"] = list(dict.fromkeys(text for text in told if text not in plain.warnings))
        return row
    except Exception as error:
        return {"raised": _raised(error)}
    finally:
        abyssal.release(model)


def _certified(certificate: abyssal.Certificate) -> dict[str, Any]:
    """How many blocks were coded, kept and so on, and what was said of them."""
    called = [block for block in certificate.blocks if block.calls]
    policies = Counter(block.policy for block in called)
    if uncalled := len(certificate.blocks) - len(called):
        policies["not called"] = uncalled
    notes = Counter(block.note for block in certificate.blocks if block.note)
    return {
        "policies": dict(policies),
        "notes": {_shortened(note): count for note, count in notes.items()},
        "note": certificate.note,
        "state_error": certificate.error,
        "drifted": len(certificate.drifted),
        "chains": certificate.chains,
        "stored_bytes": certificate.stored_bytes,
    }


def _attributes(model: nn.Module) -> set[tuple[str, str]]:
    """Names of the attributes of all modules, to see whether any is left behind."""
    return {(name, attribute) for name, module in model.named_modules() for attribute in vars(module)}


def _family(name: str, block: nn.Module) -> str:
    return f"{re.sub(r'[0-9]+$', '*', name)} {type(block).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _raised(error: Exception) -> str:
    """The error, and where in which file it was raised."""
    at, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        at, trace = f"{code.co_filename.rpartition('/')[2]}:{code.co_name}", trace.tb_next
    return f"{type(error).__name__}: {_shortened(str(error))} [{at}]"
