"""What a figure was measured on: a number without its machine, versions and date is a rumour."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

__all__ = ["Environment", "environment"]


@dataclass(frozen=True)
class Environment:
    """The machine, the versions and the time of a run.

    Attributes:
        processor: model name of the CPU.
        cores: number of cores this process may use.
        memory_bytes: main memory; None where the system does not say.
        system: operating system and architecture.
        python: version of Python.
        packages: versions of the packages the result depends on, by name.
        date: when the run began, ISO 8601 in UTC.
    """

    processor: str
    cores: int
    memory_bytes: int | None
    system: str
    python: str
    packages: dict[str, str]
    date: str

    def facts(self) -> dict[str, str]:
        """Return the same as short texts for a page's or a table's footer."""
        memory = f", {self.memory_bytes / 1e9:.0f} GB memory" if self.memory_bytes else ""
        cores = f"{self.cores} core" + ("" if self.cores == 1 else "s")
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return {
            "Machine": f"{self.processor}, {cores}{memory}",
            "System": f"{self.system}, Python {self.python}",
            "Versions": versions,
            "Date": self.date.replace("T", " ").replace("+00:00", " UTC"),
        }

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)


def environment(packages: tuple[str, ...] = ("abyssal", "torch", "numpy")) -> Environment:
    """Describe this machine, now.

    Args:
        packages: distributions whose versions matter; those not installed are reported as such.
    """
    return Environment(
        processor=_processor(),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: installed_version(name) for name in packages},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def installed_version(name: str) -> str:
    """Return a distribution's version, or that it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
