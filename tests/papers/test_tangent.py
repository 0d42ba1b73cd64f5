"""`abyssal tangent`: the papers' networks, networks of one's own by width, one model along a training; resuming."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from abyssal.cli.app import app
from abyssal.models.load import load_builder
from abyssal.papers.experiment import Work
from abyssal.papers.tangent_batches import digits_example, fingerprint
from abyssal.papers.tangent_page import _title
from abyssal.papers.tangent_widths import Family, Recipe, of_family, of_training
from abyssal.util.files import read_csv
from toys.killed import wait_until

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

FILE = """
import torch
from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet

class Net(torch.nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, width), torch.nn.Linear(width, outputs)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.first(x.flatten(1)))))

def plain(width):
    return FullyConnectedNTK(64, width, 2)

def ten(width):
    return Net(width, 10)

def own(width):
    return Net(width, 1), torch.linspace(-1, 1, 4 * 64).view(4, 64)

def one():
    return Net(16, 10)

def with_loss():
    return Net(16, 3), torch.linspace(-1, 1, 4 * 64).view(4, 64), lambda output: output.square().mean()

def of_pictures(width):
    return torch.nn.Conv2d(3, width, 3)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FILE)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["tangent", *map(str, arguments)])


LLY = ("lly", "--widths", "8,16", "--depth", "3", "--samples", "5", "--seeds", "2", "--engine", "sequential")


class TestPapersNetworks:
    @pytest.mark.slow
    def test_the_page_and_the_tables_say_the_same_and_nothing_comes_from_outside(self, tmp_path):
        result = run(*LLY, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        page = (tmp_path / "index.html").read_text()
        assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
        assert page.count('<svg role="img"') == 5  # two clocks, K3 and K4, two networks' truncations
        drift, cut = read_csv(tmp_path / "drift.csv"), read_csv(tmp_path / "truncation.csv")
        assert len(drift) == 2 * 2 * 2 and len(cut) == 2 * 2 * 2 * 3 * 2
        last = [row["drift_max_4"] for row in drift if row["network"] == "plain" and row["width"] == 16]
        assert f"{sum(last) / 2:.2%}" in page  # the median of two
        # Order 2 is the kernel at the start: its error, by the kernel now, is the drift, by the kernel at the start.
        second = [row for row in cut if row["order"] == 2]
        assert all(0.5 < row["kernel_error"] / row["drift"] < 2 for row in second)
        assert "moves less" in result.output

    @pytest.mark.slow
    def test_a_killed_command_goes_on_and_ends_in_the_same_tables(self, tmp_path):
        out = tmp_path / "killed"
        slow = ("lly", "--widths", "16,24,32", "--depth", "4", "--seeds", "9", "--out", str(out), "--jobs", "1")
        command = [sys.executable, "-m", "abyssal", "tangent", *slow]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: count(out / "tangent.sqlite") >= 3, first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = count(out / "tangent.sqlite")
        assert not (out / "drift.csv").exists()
        assert run(*slow).exit_code == 0
        connection = sqlite3.connect(out / "tangent.sqlite")
        computed = [times for (times,) in connection.execute("SELECT computed FROM cells WHERE study != 'sources'")]
        connection.close()
        assert len(computed) == 24 > before >= 3 and set(computed) == {1}
        whole = run(*slow[:-3], str(tmp_path / "whole"), "--engine", "sequential")
        assert whole.exit_code == 0, whole.output
        for name in ("drift.csv", "truncation.csv"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def count(store: Path) -> int:
    if not store.exists():
        return 0
    connection = sqlite3.connect(store, timeout=60)
    try:
        return connection.execute("SELECT count(*) FROM cells WHERE study != 'sources'").fetchone()[0]
    except sqlite3.OperationalError:  # the table is not there yet
        return 0
    finally:
        connection.close()


class TestFamily:
    @pytest.mark.slow
    def test_networks_of_ones_own_are_measured_at_every_width(self, models, tmp_path):
        arguments = (f"{models}:plain", "--widths", "8,32", "--seeds", "2", "--samples", "5", "--out", tmp_path)
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        page = (tmp_path / "index.html").read_text()
        assert page.count('<svg role="img"') == 3 and "plain" in page
        drift = read_csv(tmp_path / "drift.csv")
        assert len(drift) == 4 and all(row["K4"] > 0 and 0 < row["loss_max_4"] < 1 for row in drift)
        stored = count(tmp_path / "tangent.sqlite")
        assert stored == 4
        assert run(*arguments).exit_code == 0 and count(tmp_path / "tangent.sqlite") == stored

    def test_it_finds_what_the_batched_networks_find(self, models):
        from abyssal.nn import FullyConnectedNTK
        from abyssal.papers.networks.lly_batch import Networks, higher_kernels
        from abyssal.papers.shared.lly_flow import gradient_flow

        family = Family(load_builder(f"{models}:plain"), "x", f"{models}:plain", "digits", 1, 5)
        found = of_family(family, [8, 16], Work())
        row = found.drift_rows[0]
        model = family.model(8, 0)
        assert isinstance(model.model, FullyConnectedNTK)
        x, y = family.problem(model, 0)
        networks = Networks.of([model.model], "tanh")
        kernels = higher_kernels(networks, x.double())
        assert row["K4"] == pytest.approx(float(kernels[2].abs().max()), rel=1e-6)  # x is float32's
        times = torch.tensor([0.0, *found.drift.by_largest]).double() * 5 / row["lambda_max"]
        flow = gradient_flow(networks, x.double(), y, times, 0.1)
        assert row["drift_max_4"] == pytest.approx(float(flow.drift()[-1]), rel=1e-4)
        assert _title(found).startswith("The kernel's drift goes as m^")

    def test_more_outputs_than_k4_has_room_for_leave_it_out_and_say_so(self, models):
        family = Family(load_builder(f"{models}:ten"), "x", f"{models}:ten", "digits", 1, 3)
        found = of_family(family, [4, 8], Work())
        assert found.orders == [2, 3] and "K4 is formed up to 24" in found.notes[0]
        assert all(row["K4"] is None for row in found.drift_rows)

    def test_a_batch_of_ones_own_is_taken_and_the_global_random_state_left(self, models):
        family = Family(load_builder(f"{models}:own"), "x", f"{models}:own", "own", 1, 10)
        state = torch.get_rng_state()
        found = of_family(family, [4, 8], Work())
        assert torch.equal(torch.get_rng_state(), state)
        assert found.drift.n == 4 and "its own batch of 4" in found.subject


class TestTraining:
    def test_a_model_is_trained_on_digits_and_read(self, models, tmp_path):
        result = run(f"{models}:one", "--data", "digits", "--steps", "3", "--samples", "6", "--out", tmp_path)
        assert result.exit_code == 0, result.output
        page = (tmp_path / "index.html").read_text()
        assert page.count('<svg role="img"') == 2 and "in 3 steps" in page
        rows = read_csv(tmp_path / "training.csv")
        assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["distance"] == 0
        assert 0 < rows[1]["distance"] < rows[3]["distance"] and rows[3]["loss"] < rows[0]["loss"]
        again = run(f"{models}:one", "--data", "digits", "--steps", "3", "--samples", "6", "--out", tmp_path)
        assert again.exit_code == 0 and rows == read_csv(tmp_path / "training.csv")

    def test_the_kernel_is_of_evaluation_and_its_first_value_that_of_ntk(self, models):
        from abyssal.models.load import load_model
        from abyssal.tangent.empirical.ntk import ntk

        loaded = load_model(f"{models}:one")
        example = digits_example(loaded.model, 5)
        kernel = ntk(loaded.model.eval(), example.batch)  # ten outputs: all of them are summed
        found = of_training(loaded, "x", example, Recipe(steps=2, optimizer="sgd", lr=0.1), Work())
        assert found.outputs == (10, 10) and len(found.losses) == 3
        wanted = torch.linalg.eigvalsh(kernel).flip(0)
        # Eigenvalues of float32 kernels: to 1e-6 of the largest.
        assert found.eigenvalues[0] == pytest.approx(wanted.double().numpy(), abs=1e-5 * float(wanted[0]))

    def test_a_batch_with_its_loss_comes_with_the_model(self, models, tmp_path):
        result = run(f"{models}:with_loss", "--steps", "2", "--optimizer", "sgd", "--out", tmp_path)
        assert result.exit_code == 0, result.output
        assert "kernel of 4 samples, 3 of 3 outputs" in result.output


LOADING = """
import torch
from helper import GAIN

class Net(torch.nn.Sequential):
    def forward(self, x):
        return GAIN * super().forward(x.flatten(1))

def one():
    net = Net(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    net.load_state_dict(torch.load("weights.pt"))
    return net

def of_width(width):
    return Net(torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
"""


class TestWhatChangesBesideTheFile:
    """The same spec and the same text, but not the same model: results of the old one would be wrong."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        (tmp_path / "loading.py").write_text(LOADING)
        self.change(1.0, 0.1)
        return tmp_path

    def change(self, gain: float, std: float) -> None:
        sys.modules.pop("helper", None)
        Path("helper.py").write_text(
            f"GAIN = {gain}{' ' * int(gain)}"
        )  # another size, or Python takes the old bytecode
        weights = {"0.weight": (8, 64), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)}
        torch.manual_seed(0)
        torch.save({name: std * torch.randn(shape) for name, shape in weights.items()}, "weights.pt")

    @pytest.mark.slow
    @pytest.mark.parametrize(("gain", "std"), [(1.0, 0.3), (2.0, 0.1)])
    def test_a_training_is_done_again(self, folder, gain, std):
        def losses(out: str) -> list[object]:
            result = run("loading.py:one", "--data", "digits", "--steps", "1", "--samples", "4", "--out", out)
            assert result.exit_code == 0, result.output
            return [row["loss"] for row in read_csv(folder / out / "training.csv")]

        first = losses("out")
        assert losses("out") == first and count(folder / "out" / "tangent.sqlite") == 1
        self.change(gain, std)
        second = losses("out")
        assert second != first and second == losses("fresh")
        self.change(1.0, 0.1)  # and what was computed for the first is still there
        assert losses("out") == first and count(folder / "out" / "tangent.sqlite") == 2

    @pytest.mark.slow
    def test_a_family_is_measured_again(self, folder):
        def found() -> list[object]:
            arguments = ("--widths", "4,8", "--seeds", "1", "--samples", "3", "--out", "out")
            result = run("loading.py:of_width", *arguments)
            assert result.exit_code == 0, result.output
            return [row["lambda_max"] for row in read_csv(folder / "out" / "drift.csv")]

        first = found()
        self.change(2.0, 0.1)
        assert found() == pytest.approx([4 * value for value in first], rel=1e-4)


def test_a_fingerprint_is_that_of_weights_buffers_settings_inputs_and_outputs() -> None:
    class Net(torch.nn.Linear):
        def __init__(self, function=torch.tanh, gain=1.0, mean=0.0, std=1.0):
            torch.manual_seed(0)
            super().__init__(3, 2)
            self.function, self.gain = function, gain
            self.register_buffer("mean", torch.tensor(mean), persistent=False)
            with torch.no_grad():
                self.weight.mul_(std)

        def extra_repr(self) -> str:
            return repr(lambda: 0)  # <function ... at 0x...>

        def forward(self, x):
            return self.gain * self.function(super().forward(x) - self.mean)

    x = torch.randn(4, 3)
    nets = [Net(), Net(torch.sin), Net(gain=2.0), Net(mean=1.0), Net(std=2.0), Net().double()]
    found = [fingerprint(net, x.to(net.weight.dtype)) for net in nets]
    found += [fingerprint(Net(), 2 * x), fingerprint(Net(), x, x), fingerprint(Net().requires_grad_(False), x)]
    assert len(set(found)) == len(found) == 9
    assert fingerprint(Net(), x.clone()) == found[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("lly", "--widths", "8"), "two or more whole numbers, ascending"),
            (("lly", "--widths", "16,8"), "ascending"),
            (("lly", "--widths", "8,x"), "expected numbers separated by commas"),
            (("lly", "--steps", "3"), "--steps: is an option of a model without --widths"),
            (("lly", "--data", "own"), "expected digits or sphere"),
            (("lly", "--samples", "1"), "at least 2"),
            (("lly", "--samples", "5000"), "at most 1797"),
            (("lly", "--depth", "0"), "--depth 0: expected a positive number"),
            (("lly", "--activation", "relu"), "two derivatives"),
            (("lly", "--engine", "cluster"), "There is no engine"),
            (("models.py:none", "--widths", "8,16"), "there is no file"),
            (("timm:resnet18", "--widths", "8,16"), "expected path/to/file.py:build"),
            (("resnet18",), "expected a prefix and a name"),
            (("lly", "--widths", "8,16", "--lr", "0.1"), "--lr: is an option of"),
        ],
    )
    def test_bad_wishes_get_one_line_before_there_is_a_folder(self, arguments, said, tmp_path):
        result = run(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("which", "more", "said"),
        [
            ("of_pictures", ("--widths", "2,4"), "does not take digits as [10, 1, 8, 8]"),
            ("ten", ("--widths", "2,4", "--data", "own"), "gives no batch of tensors"),
            ("plain", ("--widths", "2,4", "--depth", "3"), "--depth: is an option of lly"),
            ("one", (), "no batch is known"),
        ],
    )
    def test_models_that_the_samples_do_not_fit_are_told_of(self, models, which, more, said, tmp_path):
        result = run(f"{models}:{which}", *more, "--out", tmp_path / "out")
        assert result.exit_code == 2 and said in result.output
        assert len(result.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
