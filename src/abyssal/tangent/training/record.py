"""What was recorded of a tangent kernel along training: readings, a table, a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from abyssal.report.axes import COLOURS, Plotted, new_figure
from abyssal.tangent.training.spectra import Spectrum, from_eigenvalues
from abyssal.util.files import for_json, write_csv
from abyssal.util.text import printed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Drift", "Reading"]

_ROWS = 12  # of a printed table


@dataclass(frozen=True, eq=False)
class Reading:
    """The kernel K at one step of training, beside K0 at the first reading. Norms are Frobenius norms.

    Attributes:
        step: training steps so far.
        distance: `|K - K0| / |K0|`; nan where K is not finite, as are all figures then.
        alignment: `<K, K0> / (|K| |K0|)`, 1 where K is a multiple of K0.
        centred_alignment: the same of both kernels centred over samples.
        target_alignment: `<K, Y Y^T> / (|K| |Y Y^T|)` with the labels; None without labels.
        centred_target_alignment: the same, both centred.
        spectrum: of K; None where eigenvalues were not asked for, or K is not finite.
    """

    step: int
    distance: float = math.nan
    alignment: float = math.nan
    centred_alignment: float = math.nan
    target_alignment: float | None = None
    centred_target_alignment: float | None = None
    spectrum: Spectrum | None = field(default=None, repr=False)

    def figures(self) -> dict[str, float]:
        """Return the numbers by name; those that were not asked for are left out."""
        found = {"step": self.step, "distance": self.distance, "alignment": self.alignment}
        found["centred_alignment"] = self.centred_alignment
        if self.target_alignment is not None and self.centred_target_alignment is not None:
            found["target_alignment"] = self.target_alignment
            found["centred_target_alignment"] = self.centred_target_alignment
        if self.spectrum is not None:
            for name in ("trace", "largest", "least", "condition", "effective_rank", "stable_rank"):
                found[name] = getattr(self.spectrum, name)
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reading:
        """Return the reading that `dataclasses.asdict` made a state of."""
        spectrum = state["spectrum"]
        if spectrum is not None:
            spectrum = from_eigenvalues(spectrum["eigenvalues"], spectrum["rounding"])
        return cls(**{**state, "spectrum": spectrum})


@dataclass(frozen=True, eq=False)
class Drift(Plotted):
    """How a tangent kernel moved along training.

    Attributes:
        readings: in order of steps; the first is what the others are compared with.
        outputs: which kernel: "trace", "full", "diagonal", or an output's index.
        kernels: one for each reading, on the CPU, where they were kept; else None.
    """

    readings: tuple[Reading, ...]
    outputs: str | int
    kernels: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Reading]:
        return iter(self.readings)

    def __len__(self) -> int:
        return len(self.readings)

    @property
    def steps(self) -> tuple[int, ...]:
        """Training steps at each reading, [readings]."""
        return tuple(reading.step for reading in self.readings)

    @property
    def distance(self) -> Tensor:
        """Relative distance from the first kernel, [readings]."""
        return self._column("distance")

    @property
    def alignment(self) -> Tensor:
        """Alignment with the first kernel, [readings]."""
        return self._column("alignment")

    @property
    def target_alignment(self) -> Tensor | None:
        """Alignment with the labels, [readings]; None without labels."""
        return self._column("target_alignment") if "target_alignment" in self._columns() else None

    @property
    def eigenvalues(self) -> Tensor | None:
        """Eigenvalues at each reading, [readings, n], descending; nan where the kernel was not finite."""
        spectra = [reading.spectrum for reading in self.readings]
        count = next((len(found.eigenvalues) for found in spectra if found is not None), None)
        if count is None:
            return None
        lost = torch.full((count,), math.nan, dtype=torch.float64)
        return torch.stack([lost if found is None else found.eigenvalues for found in spectra])

    def _columns(self) -> list[str]:
        return max((list(reading.figures()) for reading in self.readings), key=len)

    def _column(self, name: str) -> Tensor:
        return torch.tensor([reading.figures().get(name, math.nan) for reading in self.readings], dtype=torch.float64)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one row for each reading.

        Raises:
            ValueError: for a folder that is missing.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise ValueError(f"There is no folder {target.parent} to write {target.name} to. Make it first.")
        without = dict.fromkeys(self._columns(), math.nan)
        return write_csv([without | reading.figures() for reading in self.readings], target)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the kernels as plain data for JSON; None stands for what is not a finite number."""
        rows = []
        for reading in self.readings:
            row = for_json(reading.figures())
            if reading.spectrum is not None:
                row["eigenvalues"] = reading.spectrum.eigenvalues.tolist()
            rows.append(row)
        return {"outputs": self.outputs, "readings": rows}

    def figure(self) -> Figure:
        """Return distance, alignment, and eigenvalues where there are any, against steps."""
        figure, panels = new_figure(2 if self.eigenvalues is None else 3)
        names = {"alignment": "with the start", "centred_alignment": "with the start, centred"}
        names |= {"target_alignment": "with the labels", "centred_target_alignment": "with the labels, centred"}
        panels[0].plot(self.steps, self.distance, "o-", color=COLOURS[0], markersize=3)
        panels[0].set(title="distance of the kernel, $|K - K_0| / |K_0|$", xlabel="step", ylim=(0, None))
        for (name, label), colour in zip(names.items(), COLOURS, strict=False):
            if name in self._columns():
                panels[1].plot(self.steps, self._column(name), "o-", color=colour, markersize=3, label=label)
        panels[1].set(title="alignment of the kernel", xlabel="step")
        panels[1].legend(frameon=False, fontsize=8)
        values = self.eigenvalues
        if values is not None:
            floors = torch.tensor([r.spectrum.floor if r.spectrum else math.nan for r in self.readings])[:, None]
            shown = torch.where(values > floors, values, math.nan)
            panels[2].plot(self.steps, shown, "-", color=COLOURS[0], linewidth=0.7, alpha=0.6)
            panels[2].set(title="eigenvalues above rounding", xlabel="step", yscale="log")
        return figure

    def __rich__(self) -> Table:
        """Return a table of at most a dozen readings, from first to last."""
        chosen = self.readings
        if len(chosen) > _ROWS:
            chosen = tuple(self.readings[round(i * (len(self) - 1) / (_ROWS - 1))] for i in range(_ROWS))
        title = f"Drift of the tangent kernel ({self.outputs}), {len(self)} readings"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        columns = self._columns()
        for column in columns:
            table.add_column(column.replace("_", "\n"), justify="right")
        for reading in chosen:
            figures = reading.figures()
            table.add_row(*(f"{figures.get(name, math.nan):.4g}" for name in columns))
        return table

    def __str__(self) -> str:
        """Return the table as text."""
        return printed(self, width=140)
