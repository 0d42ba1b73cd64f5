"""`abyssal inspect` and `abyssal plan` on models as people name them: files, timm, torchvision, transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from abyssal.cli.app import app
from abyssal.planning.plan import Plan
from toys.killed import interruptible

TOY = """
import os, signal
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Toy(nn.Module):
    def __init__(self, depth=5, width=16):
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def make():
    return Toy(), torch.randn(32, 8)


def bare():
    return Toy()


def plain():
    return nn.Linear(8, 1), torch.randn(4, 8), lambda output: output.mean()


def fails():
    raise RuntimeError("no data\\nsecond line")


def misfit():
    return Toy(), torch.randn(32, 7)


def interrupted():
    model = Toy()
    model.head.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    return model, torch.randn(32, 8)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    return data


# ---------------------------------------------------------------------- inspect


@pytest.mark.slow
def test_a_factory_of_a_file_is_inspected(toy: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run("inspect", f"{toy}:make", "--report", page)
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "toy.py:make(Toy,5,681parameters)" in words.replace(" ", "")  # a long path wraps anywhere
    assert "best for block / input tion 1e-1 3e-2 1e-2 1e-3" in words
    assert "Weights as the factory made them" in words
    assert f"Page with the plots: {page}" in words
    assert "Weights as the factory made them" in page.read_text()


@pytest.mark.slow
def test_a_timm_convnext_is_inspected_stage_by_stage() -> None:
    pytest.importorskip("timm")
    data = as_json("inspect", "timm:convnext_atto", "--image-size", 32, "--batch", 2)
    names = [block["name"] for block in data["blocks"]]
    assert names[:3] == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]
    assert len(names) == 12
    assert {block["chain"] for block in data["blocks"]} == {0, 1, 2, 3}
    assert any("RANDOM (seed 0)" in note for note in data["notes"])
    assert "do next to nothing yet" in data["verdict"][0]  # ConvNeXt starts with layer scales of 1e-6


@pytest.mark.slow
def test_an_unmodified_resnet_is_inspected(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    page = tmp_path / "page.html"
    result = run("inspect", "torchvision:resnet18", "--image-size", 32, "--batch", 4, "--report", page)
    assert result.exit_code == 0, result.stderr
    assert "layer1.0" in result.stdout
    assert "RANDOM" in page.read_text()


def test_a_llama_is_inspected_from_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = as_json("inspect", f"hf:{tmp_path}", "--tokens", 16, "--tolerance", 0.5, "--tolerance", 0.01)
    assert [block["name"] for block in data["blocks"]] == [f"model.layers.{i}" for i in range(3)]
    assert data["blocks"][0]["shape"] == [2, 16, 32]
    assert [choice["tolerance"] for choice in data["tolerances"]] == [0.5, 0.01]
    assert all(choice["gradient_error"]["measured"] <= choice["tolerance"] for choice in data["tolerances"])
    assert any("RANDOM" in note for note in data["notes"])


@pytest.mark.slow
def test_one_seed_gives_one_model_and_one_batch(toy: Path) -> None:
    first, again, other = (
        [block["increment_ratio"] for block in as_json("inspect", f"{toy}:make", "--seed", seed)["blocks"]]
        for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.slow
def test_weights_of_a_file_take_the_place_of_random_ones(toy: Path, tmp_path: Path) -> None:
    data = as_json("inspect", f"{toy}:make", "--seed", 5)
    torch.manual_seed(5)
    namespace: dict[str, Any] = {}
    exec(TOY, namespace)
    model = namespace["Toy"]()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(10)  # a network of larger increments
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict()}, weights)
    loaded = as_json("inspect", f"{toy}:make", "--seed", 5, "--weights", weights)
    assert loaded["notes"] == [f"Weights from {weights}."]
    for before, after in zip(data["blocks"], loaded["blocks"], strict=True):
        assert after["increment_ratio"] > before["increment_ratio"]


# ---------------------------------------------------------------------- plan


@pytest.mark.slow
def test_a_plan_is_printed_saved_and_fits_the_model(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run("plan", f"{toy}:make", "--tolerance", 1e-2, "--save", file)
    assert result.exit_code == 0, result.stderr
    assert "blocks.4" in result.stdout
    assert "Weights as the factory made them" in result.stdout
    plan = Plan.load(file)
    assert plan.gradient_error <= 1e-2
    namespace: dict[str, Any] = {}
    exec(TOY, namespace)
    plan.check_fits(namespace["Toy"]())
    assert [path.name for path in tmp_path.glob("*plan*")] == ["plan.json"]


def test_a_plan_for_a_memory_budget_as_json(toy: Path) -> None:
    data = as_json("plan", f"{toy}:make", "--memory", "1GiB")
    assert data["memory"] == 2**30
    assert [block["name"] for block in data["blocks"]] == [f"blocks.{i}" for i in range(5)]


def test_an_impossible_budget_is_refused_with_what_is_possible(toy: Path, tmp_path: Path) -> None:
    result = run("plan", f"{toy}:make", "--memory", "1kB", "--save", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "smallest peak" in result.stderr
    assert not (tmp_path / "plan.json").exists()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nothing"], "hf:DIR"),
        (["inspect", "missing.py:make"], "no file 'missing.py'"),
        (["inspect", "{toy}:absent"], "no function 'absent'"),
        (["inspect", "{toy}:fails"], "no data second line"),
        (["inspect", "{toy}:plain"], "No residual blocks found"),
        (["inspect", "{toy}:misfit"], "mat1 and mat2"),
        (["inspect", "{toy}:make", "--batch", "3"], "brings its own batch"),
        (["inspect", "{toy}:make", "--tolerance", "0"], "numbers above 0"),
        (["inspect", "{toy}:make", "--report", "{tmp}"], "is a folder"),
        (["inspect", "{toy}:make", "--report", "{tmp}/absent/page.html"], "there is no folder"),
        (["inspect", "{toy}:make", "--weights", "{tmp}/absent.pt"], "there is no such file"),
        (["inspect", "{toy}:make", "--weights", "{toy}"], "cannot be read as a state_dict"),
        (["inspect", "{toy}:make", "--weights", "{tmp}/other.pt"], "does not fit this model"),
        (["plan", "{toy}:make"], "give --tolerance 1e-2, or --memory 2GiB"),
        (["plan", "{toy}:make", "--tolerance", "1e-2", "--memory", "1GiB"], "and not both"),
        (["plan", "{toy}:make", "--memory", "much"], "much"),
        (["plan", "{toy}:make", "--tolerance", "1e-2", "--save", "{tmp}/absent/plan.json"], "there is no folder"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments: list[str], said: str, toy: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    before = sorted(tmp_path.rglob("*"))
    result = run(*(argument.format(toy=toy, tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("abyssal:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in result.stderr
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


def test_an_error_inside_the_model_says_where(toy: Path) -> None:
    line = run("inspect", f"{toy}:misfit").stderr.splitlines()[-1]
    assert "RuntimeError" in line
    assert "ABYSSAL_TRACEBACK=1" in line


def test_the_traceback_is_there_for_those_who_ask(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABYSSAL_TRACEBACK", "1")
    result = run("inspect", f"{toy}:misfit")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.slow
def test_an_interrupt_ends_cleanly_and_writes_nothing(toy: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "abyssal", "inspect", f"{toy}:interrupted", "--report", str(page)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, preexec_fn=interruptible
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "Stopped; nothing was written."
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.html*"))


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(toy: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "abyssal", "inspect", f"{toy}:make", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["format"] == "abyssal-inspection"
    assert "blocks: 5/5" in done.stderr  # progress
