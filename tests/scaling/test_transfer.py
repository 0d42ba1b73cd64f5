"""The depth check and learning-rate transfer, on networks whose powers of depth are known by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from abyssal.cli.app import app
from abyssal.models.batches import Example
from abyssal.scaling.transfer.check import DepthCheck, depth_check
from abyssal.scaling.transfer.learning_rate import Transfer, learning_rate_transfer, plot_transfers
from abyssal.scaling.transfer.optima import lowest_point
from abyssal.scaling.transfer.recorder import prediction, trace
from abyssal.scaling.transfer.sizes import JUDGED
from abyssal.sweep import Store
from abyssal.util.stats import power_of_depth

WIDTH = 4
DEPTHS = [4, 8, 16, 32]
# float32: a sum of up to 32 terms, each rounded to one part in 2^24, gives a power of the depth that is off by some
# 32 * 6e-8 / log(8) = 1e-6; changes of 1e-3 of a value of 1 lose three digits more.
ROUNDING = 1e-3


class Shift(nn.Module):
    """`x + scale * shift`: a residual branch that is a learned constant, so that all powers are known."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.shift


class Shifts(nn.Module):
    """Blocks of `Shift` between an embedding and a head that are the identity, or nothing."""

    def __init__(self, depth: int, power: float, factor: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shift(factor * depth**-power) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Linear(nn.Module):
    """Embedding, pre-norm branches, head: what the rules can read. Wide, so that chance moves sizes little."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Branch(width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.inner(self.norm(x))))


X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)) + 4
WIDE = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
TARGET = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


def squared(output: Tensor) -> Tensor:
    return (output - TARGET).square().mean()


def mean(output: Tensor) -> Tensor:
    return output.mean()


def check(power: float, **settings: Any) -> DepthCheck:
    settings = {"batch": X, "loss": mean, "seeds": 1, "lr": 1e-2, "steps": 2} | settings
    return depth_check(lambda depth: Shifts(depth, power), DEPTHS, **settings)


# ---------------------------------------------------------------------- powers of the depth


def test_the_power_of_an_exact_power_law_is_found_without_an_error() -> None:
    slope = power_of_depth(DEPTHS, 3.0 * np.array(DEPTHS, dtype=float)[:, None] ** -0.7 * np.ones((1, 2)))
    assert slope.value == pytest.approx(-0.7, abs=1e-12)
    assert slope.high - slope.low < 1e-12
    assert slope.line([4, 100]) == pytest.approx([3 * 4**-0.7, 3 * 100**-0.7], rel=1e-12)


def test_the_power_and_its_interval_are_those_worked_out_by_hand() -> None:
    # Depths e^0, e^1, e^2 and log sizes 0, 1, 1: slope 1/2, residuals (-1/6, 1/3, -1/6), one degree of freedom, so the
    # standard error is sqrt(1/6 / 2), and Student's quantile is 12.706.
    slope = power_of_depth([1.0, math.e, math.e**2], np.exp([[0.0], [1.0], [1.0]]))
    assert slope.value == pytest.approx(0.5, rel=1e-12)
    assert slope.high - slope.value == pytest.approx(12.7062 * math.sqrt(1 / 12), rel=1e-4)


def test_the_interval_covers_the_true_power_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials = 2000
    noisy = [power_of_depth(DEPTHS, np.exp(0.1 * rng.standard_normal((4, 2)))) for _ in range(trials)]
    covered = sum(slope.low <= 0 <= slope.high for slope in noisy)
    assert abs(covered - 0.95 * trials) < 4 * math.sqrt(0.95 * 0.05 * trials)


def test_sizes_that_have_no_logarithm_are_left_out() -> None:
    slope = power_of_depth(DEPTHS, np.array([[1.0], [2.0], [math.inf], [0.0]]))
    assert slope.value == pytest.approx(1.0) and slope.points == 2 and math.isnan(slope.low)


# ---------------------------------------------------------------------- the depth check


def test_a_stack_that_is_exactly_depth_stable_passes_with_powers_of_zero() -> None:
    # Adam moves every shift by lr in each step, so that L of them times 1/L move the output by lr.
    found = check(1.0)
    assert found.passed and "Passed" in found.verdict()
    for name in JUDGED:
        assert found.slopes[name].value == pytest.approx(0.0, abs=ROUNDING), name
    assert found.slopes["increment"].value == pytest.approx(-1.0, abs=0.1)  # of a stream that grows by 1 in 4


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_first_step_of_a_stack_scaled_otherwise_moves_the_output_by_the_power_it_should(power: float) -> None:
    found = check(power)
    moved = np.array([run.blocks_moved[0] for run in found.runs])
    assert moved == pytest.approx([1e-2 * depth ** (1 - power) for depth in DEPTHS], rel=ROUNDING)
    expected = power_of_depth(DEPTHS, (moved / [run.output for run in found.runs])[:, None])
    assert found.slopes["first_step"].value == pytest.approx(expected.value)


def test_an_unscaled_stack_fails_and_is_told_what_grows() -> None:
    found = check(0.0)
    assert not found.passed
    assert {finding.quantity for finding in found.findings if finding.state == "unstable"} >= {"stream", "output"}
    assert "stream's size at initialisation grows with depth as L^0.7" in found.verdict()  # (4 + L) / 4, about


def test_a_stream_that_falls_to_what_came_in_is_not_held_against_a_rule() -> None:
    # Branches of 16 L^-1/2 in all on a stream of about 4: from three times the stream down to it.
    found = depth_check(lambda depth: Shifts(depth, 1.5, 16.0), DEPTHS, batch=X, loss=mean, seeds=1)
    states = {finding.quantity: finding.state for finding in found.findings}
    assert found.slopes["stream"].value < -0.25 and states["stream"] == "stable"
    assert found.slopes["first_step"].high < 0 and states["first_step"] != "stable"


def test_sgd_is_stable_with_the_square_root_of_depth() -> None:
    # A branch's gradient is smaller by its scale, which then makes the step smaller once more: L * (L^-1/2)^2 = 1.
    found = check(0.5, optimizer="sgd", lr=0.1)
    moved = [run.blocks_moved[0] for run in found.runs]
    assert moved == pytest.approx([moved[0]] * 4, rel=ROUNDING)


@pytest.mark.slow
def test_completep_passes_where_no_rule_does_not() -> None:
    settings: dict[str, Any] = {"batch": WIDE, "loss": squared, "seeds": 2, "lr": 1e-4}
    without = depth_check(Linear, DEPTHS, **settings)
    under = depth_check(Linear, DEPTHS, "completep", **settings)
    assert not without.passed and without.slopes["first_step"].low > without.threshold
    assert under.passed, under.verdict()
    assert under.slopes["branch_change"].low > -under.threshold


def test_one_over_sqrt_depth_is_stable_at_initialisation_but_not_in_training() -> None:
    found = depth_check(Linear, DEPTHS, "1/sqrt(L)", batch=WIDE, loss=squared, seeds=2, lr=1e-4)
    states = {finding.quantity: finding.state for finding in found.findings}
    assert states["stream"] == "stable" and states["first_step"] == "unstable" and not found.passed
    assert "learning rate would have to be" in found.verdict() and "smaller" in found.verdict()


def test_the_threshold_is_a_factor_of_two_in_the_learning_rate_or_half_way_to_the_next_power() -> None:
    assert check(1.0).threshold == 0.25  # a factor 8 in depth: log 2 / log 8 = 1/3
    wide = depth_check(lambda depth: Shifts(depth, 1.0), [2, 16, 128], batch=X, loss=mean, seeds=1, steps=1)
    assert wide.threshold == pytest.approx(1 / 6)


def test_a_check_is_reproducible_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = depth_check(Linear, [2, 3, 4], "completep", batch=WIDE, loss=squared, seeds=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = depth_check(Linear, [4, 2, 3], "completep", batch=WIDE, loss=squared, seeds=[0, 1])
    assert first.runs == again.runs


def test_blocks_that_add_in_place_and_buffers_are_recorded_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x += 0.5 * self.norm(x)
            return x

    model = nn.Sequential(InPlace(), InPlace())
    found = trace(model, {"0": model[0], "1": model[1]}, X.clone())
    assert found.before[0].view_as(X).equal(X)
    assert found.increments[0].square().mean().sqrt() == pytest.approx(0.5, rel=1e-3)  # BatchNorm's output has size 1
    assert float(model[0].norm.running_mean.abs().max()) == 0.0 and int(model[0].norm.num_batches_tracked) == 0


def test_divergence_is_a_result() -> None:
    found = check(0.0, lr=1e30, steps=3, loss=lambda output: output.square().square().mean())
    assert found.diverged == tuple(DEPTHS) and not found.passed
    assert "diverged" in found.verdict() and "diverged" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_output_that_begins_at_zero_is_measured_as_it_is() -> None:
    def build(depth: int) -> nn.Module:
        model = Linear(depth)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    found = depth_check(build, [2, 4, 8], "completep", batch=WIDE, loss=squared, seeds=2)
    states = {finding.quantity: finding.state for finding in found.findings}
    assert not found.relative and states["output"] == states["first_step"] == "allowed"
    assert "0 at initialisation" in found.verdict()


def test_batches_may_change_with_the_step_and_bring_their_own_loss() -> None:
    seen = []

    def batch(step: int) -> Example:
        seen.append(step)
        return Example(X, lambda output: (output - step).square().mean(), "")

    found = depth_check(lambda depth: Shifts(depth, 1.0), [2, 4, 8], batch=batch, seeds=1, steps=3)
    assert set(seen) == {0, 1, 2}
    assert found.runs[0].losses[1] < found.runs[0].losses[0] and not found.diverged


def test_the_scalar_loss_of_an_output_is_not_taken_for_its_prediction() -> None:
    logits = torch.zeros(3, 5)
    assert prediction({"loss": torch.tensor(1.0), "logits": logits}) is logits
    assert prediction((torch.tensor([1, 2]), logits)) is logits


@pytest.mark.slow
def test_a_check_draws_itself(tmp_path: Path) -> None:
    found = check(1.0)
    assert found.plot(tmp_path / "check.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no folder"):
        found.plot(tmp_path / "missing" / "check.png")
    with pytest.raises(ValueError, match="has to end in one of"):
        found.plot(tmp_path / "check.docx")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depths": [4, 8]}, "at least 3 different"),
        ({"depths": [4, 8, 0]}, "at least 1, got 0"),
        ({"depths": [4, 8, 8]}, "different"),
        ({"depths": "4,8,16"}, "whole number"),
        ({"rule": "completeq"}, "Did you mean 'completep'"),
        ({"steps": 0}, "steps has to be a whole number"),
        ({"steps": 2.5}, "steps has to be a whole number"),
        ({"lr": math.nan}, "lr has to be a positive number"),
        ({"lr": -1.0}, "lr has to be a positive number"),
        ({"seeds": 0}, "seeds has to be"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"base_depth": 0}, "base_depth"),
        ({"optimizer": "adam"}, "one of adamw, sgd"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"batch": None}, "batch is missing"),
        ({"batch": 3}, "batch: expected"),
        ({"loss": 3}, "loss has to be a function"),
        ({"build_model": nn.Linear(2, 2)}, "function of the depth"),
    ],
)
def test_bad_input_is_refused_before_any_network_is_built(given: dict[str, Any], message: str) -> None:
    def build(depth: int) -> nn.Module:
        raise AssertionError("built")

    arguments: dict[str, Any] = {"build_model": build, "depths": DEPTHS, "batch": X, "loss": squared} | given
    with pytest.raises((ValueError, TypeError), match=message):
        depth_check(**arguments)


def test_what_is_no_module_and_what_has_no_loss_is_named() -> None:
    with pytest.raises(TypeError, match="build_model\\(4\\) returned a int"):
        depth_check(lambda depth: depth, DEPTHS, batch=X, loss=squared)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="has no `loss`"):
        depth_check(Linear, DEPTHS, batch=WIDE)


# ---------------------------------------------------------------------- learning-rate transfer


def parabolas(model: nn.Module, groups: list[dict[str, Any]], seed: int) -> float:
    """No training: a loss whose best rate is 2^-5 * depth^-1/2, and that diverges above 2^-2."""
    depth, rate = len(model.blocks), groups[0]["lr"]  # type: ignore[arg-type]
    if rate > 0.25:
        return math.nan
    return 1.0 + (math.log2(rate) + 5 + 0.5 * math.log2(depth)) ** 2 + 0.01 * seed


RATES = [2.0**k for k in range(-11, 0)]


def parabolic(**settings: Any) -> Transfer:
    settings = {"engine": "sequential"} | settings
    return learning_rate_transfer(lambda depth: Shifts(depth, 1.0), DEPTHS, RATES, train=parabolas, **settings)


def test_the_best_rate_is_the_lowest_point_of_a_parabola() -> None:
    x = np.array([-3.0, -1.0, 0.0, 2.0])
    assert lowest_point(x, (x + 0.3) ** 2) == (pytest.approx(-0.3), False)
    assert lowest_point(x, (x + 1.1) ** 2) == (pytest.approx(-1.1), False)
    assert lowest_point(x, x) == (-3.0, True)
    assert lowest_point(x, np.array([2.0, 1.0, math.inf, math.nan])) == (-1.0, False)
    assert math.isnan(lowest_point(x, np.full(4, math.nan))[0])


def test_a_best_rate_that_falls_with_the_root_of_depth_is_found_to_do_so() -> None:
    found = parabolic()
    assert [best.rate for best in found.optima] == pytest.approx([2**-5 * depth**-0.5 for depth in DEPTHS])
    assert found.shift == pytest.approx(-1.5) and found.span == pytest.approx(1.5) and found.transfers is False
    assert found.shift_error == pytest.approx(0.0)
    assert "a factor of 2 or more" in found.verdict()
    # At depth 4 the best of the grid is 2^-6, at depth 32 2^-7 and 2^-8 are as good: (2^-7.5 is best)
    assert found.regret(32) == pytest.approx(1.5**2 - 0.5**2)


def test_rates_that_diverge_are_results_and_never_the_best() -> None:
    found = parabolic(seeds=1)
    assert np.isinf(found.losses[:, -1]).all() and np.isfinite(found.losses[:, :-2]).all()
    assert found.to_dict()["losses"][0][-1] == [None] and math.isnan(found.shift_error)
    never = learning_rate_transfer(
        lambda depth: Shifts(depth, 1.0), [1, 2], [1e30, 2e30, 4e30], batch=X, steps=8, engine="sequential",
        loss=lambda output: output.square().square().mean(),
    )  # fmt: skip
    assert np.isinf(never.losses).all() and never.transfers is None and "diverged" in never.verdict()
    with pytest.raises(ValueError, match="no best one"):
        never.optimum(1)
    assert "diverged" in str(never)


def test_one_seed_decides_nothing() -> None:
    assert parabolic(seeds=1).transfers is None


def test_a_best_rate_at_the_edge_decides_nothing() -> None:
    found = learning_rate_transfer(
        lambda depth: Shifts(depth, 1.0), DEPTHS, RATES[-4:], train=parabolas, engine="sequential"
    )
    assert found.optimum(4).at_edge and found.transfers is None and "not decided" in found.verdict()


def test_the_interval_pools_the_spread_over_depths() -> None:
    losses = np.empty((2, 5, 2))
    x = np.log2(RATES[:5])
    for row, seed, best in [(0, 0, -9.2), (0, 1, -8.8), (1, 0, -9.1), (1, 1, -8.5)]:
        losses[row, :, seed] = (x - best) ** 2
    found = Transfer("none", (4, 8), tuple(RATES[:5]), (0, 1), losses)
    spread = math.sqrt((2 * 0.2**2 + 2 * 0.3**2) / 2)
    assert found.shift == pytest.approx(0.2)
    assert found.shift_error == pytest.approx(4.30265273 * spread, rel=1e-6)  # Student's quantile at two degrees
    assert found.transfers is None


def test_the_built_in_training_learns() -> None:
    found = learning_rate_transfer(
        Linear, [2, 4], [1e-4, 1e-3, 1e-2], "completep", batch=WIDE, loss=squared, steps=20, engine="sequential"
    )
    start = float(squared(torch.zeros_like(TARGET)))
    assert found.mean_losses[:, 2].max() < start and (found.mean_losses[:, 0] > found.mean_losses[:, 2]).all()
    assert found.rule == "completep" and found.seconds > 0


@pytest.mark.slow
def test_a_stopped_search_goes_on_where_it_was(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module, groups: list[dict[str, Any]], seed: int) -> float:
        calls.append(seed)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return parabolas(model, groups, seed)

    search = {"train": counted, "engine": "sequential", "name": "parabolas"}
    build = lambda depth: Shifts(depth, 1.0)  # noqa: E731
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(KeyboardInterrupt):
        learning_rate_transfer(build, DEPTHS, RATES, store=store, **search)  # type: ignore[arg-type]
    with Store(tmp_path / "s.sqlite") as store:
        found = learning_rate_transfer(build, DEPTHS, RATES, store=store, **search)  # type: ignore[arg-type]
        assert len(calls) == 1 + len(DEPTHS) * len(RATES) * 2
        assert np.array_equal(found.losses, parabolic().losses)
        other = learning_rate_transfer(build, DEPTHS, RATES, "none", store=store, seeds=1, **search)  # type: ignore[arg-type]
    assert len(calls) == 1 + len(DEPTHS) * len(RATES) * 2 and np.array_equal(other.losses, found.losses[:, :, :1])


def test_transfers_are_drawn_side_by_side(tmp_path: Path) -> None:
    found = parabolic()
    assert plot_transfers(tmp_path / "two.svg", found, found).stat().st_size > 10_000
    with pytest.raises(ValueError, match="no transfer"):
        plot_transfers(tmp_path / "none.svg")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rates": [1e-3, 1e-2]}, "at least 3"),
        ({"rates": [1e-3, 1e-2, math.nan]}, "rates has to be a positive number, got nan"),
        ({"rates": [1e-3, 1e-2, 0.0]}, "rates has to be a positive number, got 0.0"),
        ({"depths": [4]}, "at least 2"),
        ({"train": None}, "nothing to train on"),
        ({"train": lambda model: 0.0}, "train\\(model, groups, seed\\)"),
        ({"engine": "spark"}, "no engine"),
        ({"rule": "mup-depth-x"}, "No rule"),
    ],
)
def test_a_bad_search_is_refused_before_any_network_is_built(given: dict[str, Any], message: str) -> None:
    def build(depth: int) -> nn.Module:
        raise AssertionError("built")

    arguments: dict[str, Any] = {"depths": DEPTHS, "rates": RATES, "train": parabolas} | given
    with pytest.raises((ValueError, TypeError), match=message):
        learning_rate_transfer(build, **arguments)


def test_a_store_needs_a_name_for_what_it_keeps(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(ValueError, match="needs a name"):
        parabolic(store=store)


@pytest.mark.slow
def test_the_benchmark_writes_its_section_and_trains_nothing_twice(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "depth_transfer.py"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- depth-transfer:begin -->\nyesterday\n<!-- depth-transfer:end -->\nafter\n")
    options = [
        "--quick",
        "--rules",
        "completep",
        "--checks",
        "completep",
        "--store",
        str(tmp_path / "s.sqlite"),
        "--out",
        str(tmp_path),
    ]
    command = [sys.executable, str(script), *options, "--write", str(page), "--plots", str(tmp_path)]
    for _ in range(2):
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    text = page.read_text()
    assert (
        text.startswith("before") and text.endswith("after\n") and "| `completep` |" in text and "yesterday" not in text
    )
    assert (tmp_path / "depth-transfer-small.png").exists() and (tmp_path / "depth_transfer.json").exists()
    with Store(tmp_path / "s.sqlite") as store:
        (study,) = {row[0] for row in store._connection.execute("SELECT study FROM cells")}
        assert [record.computed for record in store.records(study)] == [1] * 6


# ---------------------------------------------------------------------- the command

FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.out(torch.relu(self.inner(x)))

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

def build(depth):
    model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(depth)], nn.Linear(64, 64))
    return model, X, lambda y: (y - 1).square().mean()

def fails(depth):
    raise RuntimeError("no such depth")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["depth-check", *arguments])


@pytest.mark.slow
def test_the_command_writes_a_page_that_needs_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "check"
    quick = ("--depths", "2,4,8,16", "--seeds", "2", "--lr", "1e-4", "--steps", "3", "--out", str(out))
    done = command(f"{model}:build", "--rule", "completep", *quick, "--rates", "1e-3,4e-3,1.6e-2", "--train-steps", "5")
    assert done.exit_code == 0, done.output
    page = (out / "index.html").read_text()
    assert "<svg" in page and "completep" in page and "http" not in page.replace("http://www.w3.org", "")
    numbers = json.loads((out / "depth-check.json").read_text())
    assert numbers["check"]["passed"] and len(numbers["check"]["runs"]) == 8
    assert np.shape(numbers["transfer"]["losses"]) == (4, 3, 2)
    assert (out / "depth-check.png").exists() and (out / "transfer.png").exists()


@pytest.mark.slow
def test_the_command_ends_with_code_1_where_the_check_does_not_pass(model: Path, tmp_path: Path) -> None:
    done = command(f"{model}:build", "--depths", "2,8,32", "--seeds", "2", "--steps", "1", "--out", str(tmp_path / "o"))
    assert done.exit_code == 1 and "Not passed" in done.output and (tmp_path / "o" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "completeq"), "Did you mean 'completep'"),
        (("--depths", "8,16"), "at least 3"),
        (("--depths", "8,x"), "--depths 8,x"),
        (("--steps", "0"), "steps has to be"),
        (("--lr", "nan"), "lr has to be"),
        (("--rates", "1e-3,2e-3"), "at least 3"),
        (("--tokens", "5"), "brings its own batch"),
    ],
)
def test_the_command_refuses_bad_input_before_any_work(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = command(f"{model}:build", *arguments, "--out", str(tmp_path / "o"))
    assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "o").exists()


def test_the_command_names_what_is_wrong_with_the_file(model: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "o"))
    for spec, message in [
        (f"{model}:missing", "no function 'missing'"),
        (f"{model}:fails", "fails(8) failed: RuntimeError: no such depth"),
        (f"{model}x:build", "expected path/to/file.py:build"),
        (f"{tmp_path}/other.py:build", "there is no file"),
    ]:
        done = command(spec, *out)
        assert done.exit_code == 2 and message in done.output, done.output
    blocked = command(f"{model}:build", "--out", str(model))
    assert blocked.exit_code == 2 and "cannot write there" in blocked.output
