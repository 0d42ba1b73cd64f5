"""The public face: what `import abyssal` costs, what it offers, and of which types its calls are.

`assert_type` does nothing when it runs: mypy, which reads the tests too, is what fails.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import assert_type

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal import scaling, tangent
from abyssal.tangent.operator.kernel import KernelOperator

FACE = Path(abyssal.__file__)


def loaded_after(code: str) -> set[str]:
    """The names of all modules that a fresh interpreter has loaded after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_abyssal_loads_no_room() -> None:
    assert {name for name in loaded_after("import abyssal") if name.startswith("abyssal")} == {"abyssal"}


def test_a_first_reconstruct_loads_no_library_that_it_does_not_need() -> None:
    code = (
        "import torch, abyssal\n"
        "block = torch.nn.TransformerEncoderLayer(8, 1, 8, dropout=0, norm_first=True)\n"
        "model = torch.nn.TransformerEncoder(block, 4, enable_nested_tensor=False)\n"
        "abyssal.reconstruct(model)\n"
        "model(torch.randn(2, 3, 8)).sum().backward()\n"
        "abyssal.certificate(model)"
    )
    heavy = {"matplotlib", "scipy", "rich", "jinja2", "joblib", "typer", "transformers", "timm", "torchvision"}
    heavy |= {"torch._dynamo", "sympy"}  # two seconds, for who compiles nothing
    rooms = {"abyssal.planning", "abyssal.scaling", "abyssal.tangent", "abyssal.limits", "abyssal.report", "abyssal.nn"}
    assert loaded_after(code).isdisjoint(heavy | rooms)


def test_every_public_name_is_found_and_listed() -> None:
    assert sorted(abyssal.__all__) == abyssal.__all__
    for name in abyssal.__all__:
        assert getattr(abyssal, name) is not None
        assert name in dir(abyssal)
    with pytest.raises(AttributeError, match="no attribute 'reverse'"):
        _ = abyssal.reverse  # type: ignore[attr-defined]


def test_type_checkers_are_told_the_homes_that_names_are_taken_from() -> None:
    """The face names each home twice: in imports that only type checkers read, and where names are looked up."""
    told = {
        alias.asname or alias.name: f"{node.module}.{alias.name}" if alias.asname else str(node.module)
        for node in ast.walk(ast.parse(FACE.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "abyssal"
        for alias in node.names
    }
    told.pop("installed_version")
    homes = {name: f"abyssal.{home}" if home else "abyssal" for name, home in abyssal._HOMES.items()}
    assert told == homes
    assert sorted(homes) == abyssal.__all__


class Block(nn.Module):
    """`x + W tanh(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(torch.tanh(x))


def test_public_calls_return_what_type_checkers_are_told() -> None:
    model = nn.Sequential(*[Block() for _ in range(4)])
    x = torch.randn(3, 8)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    assert_type(abyssal.find_blocks(model), dict[str, nn.Module])
    assert_type(abyssal.reconstruct(model, abyssal.Code(4)), nn.Module)
    loss(model(x)).backward()
    certificate = abyssal.certificate(model)
    assert_type(certificate, abyssal.Certificate)
    assert_type(certificate.stored_bytes, int)
    assert_type(certificate.blocks[0].error, float | None)
    with abyssal.paused(model) as same:
        assert_type(same, nn.Module)
    assert_type(abyssal.release(model), nn.Module)
    plan = abyssal.plan(model, x, loss=loss, tolerance=1e-2)
    assert_type(plan, abyssal.Plan)
    assert_type(abyssal.forecast(model, x, loss=loss), abyssal.Forecast)
    assert_type(abyssal.inspect(model, x, loss=loss), abyssal.Inspection)
    assert_type(tangent.ntk(model, x), Tensor)
    assert_type(tangent.kernel_operator(model, x), KernelOperator)
    assert_type(scaling.apply(model, rule="completep", base_depth=4, batch=x), scaling.Scaled)
    for value, kind in ((plan, abyssal.Plan), (certificate, abyssal.Certificate)):
        assert isinstance(value, kind)
