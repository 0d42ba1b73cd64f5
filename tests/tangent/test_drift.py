"""Kernel drift against direct computation, on models whose kernel moves in a known way; training is not disturbed."""

from __future__ import annotations

import copy
import csv
import gc
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abyssal
from abyssal.profiling.track import track
from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.training.recorder import DriftRecorder, drift
from toys.huggingface import import_transformers

N = 8


def network() -> nn.Module:
    """Everything that recording could disturb: dropout, running statistics, two modes at once."""
    model = nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)
    )
    model[5].eval()
    return model


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def training(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> Iterator[float]:
    x, y = data()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        part = slice(8 * (step % 3), 8 * (step % 3) + 8)
        loss = F.cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def probe() -> Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(9))


def kernel(model: nn.Module, outputs: Any = "trace") -> Tensor:
    return ntk(copy.deepcopy(model).eval(), probe(), outputs=outputs).double()


# ---------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("outputs", ["trace", "full", "diagonal", 1])
def test_distance_and_alignment_are_those_of_the_kernels(outputs: Any) -> None:
    model = network()
    kernels = [kernel(model, outputs)]

    def steps() -> Iterator[None]:
        for _ in training(model, 4):
            kernels.append(kernel(model, outputs))
            yield

    found = drift(model, probe(), steps, outputs=outputs)
    assert found.steps == (0, 1, 2, 3, 4)
    for reading, K in zip(found, kernels, strict=True):
        K0 = kernels[0]
        assert reading.distance == pytest.approx(float((K - K0).norm() / K0.norm()), abs=1e-7)
        assert reading.alignment == pytest.approx(float((K * K0).sum() / K.norm() / K0.norm()), abs=1e-7)
    assert found.distance[0] == 0
    assert found.distance[-1] > 0.01


def test_centred_alignment_is_that_of_centred_features() -> None:
    """Of the kernel of gradients whose mean over samples was taken away."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = probe().double()

    def centred_gradients() -> Tensor:
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(x)[i, 0], list(model.parameters()))])
            for i in range(N)
        ]
        J = torch.stack(rows)
        J = J - J.mean(0)
        return J @ J.T

    recorder = DriftRecorder(model, x)
    recorder.record(0)
    before = centred_gradients()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    reading = recorder.record(1)
    after = centred_gradients()
    expected = float((after * before).sum() / after.norm() / before.norm())
    assert reading.centred_alignment == pytest.approx(expected, rel=1e-12)


def test_a_linear_models_kernel_does_not_move() -> None:
    model = nn.Linear(5, 3)
    found = drift(model, probe(), training(model, 5), every=2)
    assert found.steps == (0, 2, 4, 5)
    assert found.distance.tolist() == [0, 0, 0, 0]
    assert torch.allclose(found.alignment, torch.ones(4, dtype=torch.float64))


class Scaled(nn.Module):
    """`f = a^2 / 2 * v(x)`: its kernel is `a^2 v v^T`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a**2 / 2 * x[:, 0]


def test_a_kernel_that_grows_only_is_distant_and_aligned() -> None:
    model, x = Scaled(), probe().double()

    def grow() -> None:
        with torch.no_grad():
            model.a *= 2**0.5

    found = drift(model, x, grow, steps=3, y=x[:, 0])
    assert torch.allclose(found.distance, torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64))
    assert torch.allclose(found.alignment, torch.ones(4, dtype=torch.float64))
    assert found.target_alignment is not None
    assert torch.allclose(found.target_alignment, torch.ones(4, dtype=torch.float64))
    assert found.eigenvalues is not None
    top = float(x[:, 0].square().sum())
    assert torch.allclose(found.eigenvalues[:, 0], top * torch.tensor([1.0, 2, 4, 8], dtype=torch.float64))


def test_classes_are_aligned_with_as_one_hot_columns() -> None:
    model, y = network(), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])  # class 2 is not among them
    hot = F.one_hot(y, 3).double()
    for outputs, ideal in (
        ("trace", hot @ hot.T),
        ("full", torch.einsum("ia,jb->ijab", hot, hot)),
        ("diagonal", torch.einsum("ia,ja->ija", hot, hot)),
        (1, hot[:, [1]] @ hot[:, [1]].T),
    ):
        recorder = DriftRecorder(model, probe(), y, outputs=outputs)  # type: ignore[arg-type]
        K = kernel(model, outputs)
        expected = float((K * ideal).sum() / K.norm() / ideal.norm())
        assert recorder.record(0).target_alignment == pytest.approx(expected, rel=1e-6)


def test_training_on_labels_aligns_the_kernel_with_them() -> None:
    """Baratin et al. 2021: the alignment grows during training."""
    x, y = data(32)
    y = torch.sign(x[:, 0] * x[:, 1])
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x)[:, 0], y).backward()
        optimizer.step()

    found = drift(model, x, step, steps=300, every=100, y=y)
    assert found.target_alignment is not None
    assert found.target_alignment[-1] > 1.3 * found.target_alignment[0]


def test_eigenvalues_are_recorded_or_left_out() -> None:
    model = network()
    with_them = drift(model, probe(), training(model, 2))
    assert with_them.eigenvalues is not None
    assert with_them.eigenvalues.shape == (3, N)
    final = torch.linalg.eigvalsh(kernel(model)).flip(0)
    assert torch.allclose(with_them.eigenvalues[-1], final, rtol=0, atol=1e-5 * float(final[0]))
    assert drift(model, probe(), training(model, 2), eigenvalues=False).eigenvalues is None


def test_a_training_that_diverged_is_recorded_as_such() -> None:
    model = network()
    recorder = DriftRecorder(model, probe())
    recorder.record(0)
    with torch.no_grad():
        model[4].weight.fill_(float("nan"))
    assert np.isnan(recorder.record(1).distance)
    found = recorder.result()
    assert found.eigenvalues is not None
    assert found.eigenvalues[1].isnan().all()
    assert "nan" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["readings"][1]["distance"] is None


# ---------------------------------------------------------------------- training is left alone


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("around", ["nothing", "autocast", "no_grad"])
def test_training_with_a_recorder_is_the_same_to_the_bit(name: str, around: str) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        recorder = DriftRecorder(model, probe(), data(N)[1])
        losses = []
        for step, loss in enumerate(training(model, 6, optimizer), start=1):
            losses.append(loss + random.random() + np.random.random())
            if recorded:
                context = {"autocast": torch.autocast("cpu", torch.bfloat16), "no_grad": torch.no_grad()}.get(around)
                if context is None:
                    recorder.record(step)
                else:
                    with context:
                        recorder.record(step)
        random.seed(0)
        np.random.seed(0)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        ends.append((losses, state, torch.get_rng_state(), [m.training for m in model.modules()]))
    (losses, state, chance, modes), (losses_2, state_2, chance_2, modes_2) = ends
    assert losses == losses_2
    torch.testing.assert_close(state_2, state, rtol=0, atol=0)
    assert torch.equal(chance, chance_2)
    assert modes == modes_2
    assert recorder.result().distance[-1] > 0


class Caching(nn.Module):
    """Keeps in eval mode what it computed from its weights, until `train(True)`, as LeViT and TinyViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bias, self.last = nn.Linear(5, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        bias = 3 * self.bias
        if not self.training:
            bias = self.cache.setdefault("bias", bias)
        return self.last(torch.tanh(self.inner(x) + bias))


@pytest.mark.parametrize("validated", [False, True])
def test_what_a_model_keeps_in_eval_mode_is_neither_used_nor_left(validated: bool) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Caching().train()
        recorder = DriftRecorder(model, probe(), keep_kernels=True)
        for step in range(3):
            for _ in training(model, 1):
                pass
            if validated:
                model.eval()
                with torch.no_grad():
                    model(probe())
            before = dict(model.cache)
            if recorded:
                recorder.record(step)
                fresh = Caching()
                fresh.load_state_dict(model.state_dict())
                assert recorder.result().kernels is not None
                # In training mode it keeps nothing, and is the same function.
                torch.testing.assert_close(recorder.result().kernels[-1], ntk(fresh.train(), probe()))
            assert model.cache == before
            model.train()
        with torch.no_grad():
            ends.append(model.eval()(probe()))
    assert torch.equal(*ends)


def test_a_reading_in_inference_mode_is_that_outside_of_it() -> None:
    model = network()
    outside = DriftRecorder(model, probe(), keep_kernels=True)
    outside.record(0)
    with torch.inference_mode():
        x = probe()
        inside = DriftRecorder(model, x, data(N)[1], keep_kernels=True)
        inside.record(0)
        frozen = nn.Linear(5, 3)
    assert outside.result().kernels is not None and inside.result().kernels is not None
    assert torch.equal(outside.result().kernels[0], inside.result().kernels[0])
    with pytest.raises(ValueError, match=r"weight of Linear was made in torch\.inference_mode"):
        DriftRecorder(frozen, x)


def test_gradients_that_wait_for_their_step_are_left_alone() -> None:
    model = network()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    before = [(p.grad, p.grad.clone(), p._version) for p in model.parameters() if p.grad is not None]
    called: list[Any] = []
    for p in model.parameters():
        p.register_hook(called.append)
        p.register_post_accumulate_grad_hook(called.append)
    DriftRecorder(model, probe()).record(0)
    after = [(p.grad, p._version) for p in model.parameters()]
    assert len(before) == len(after)
    for (grad, value, version), (now, version_now) in zip(before, after, strict=True):
        assert now is grad
        assert torch.equal(grad, value)
        assert version == version_now
    assert not called
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert len(called) == 2 * len(before)  # and the hooks are back


def test_autocast_around_a_reading_does_not_change_it() -> None:
    model = network()
    plain = DriftRecorder(model, probe(), keep_kernels=True)
    plain.record(0)
    inside = DriftRecorder(model, probe(), keep_kernels=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside.record(0)
    assert plain.result().kernels is not None
    assert inside.result().kernels is not None
    assert torch.equal(plain.result().kernels[0], inside.result().kernels[0])


def test_a_graph_that_is_alive_across_a_reading_can_still_be_walked() -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = network()
        loss = F.cross_entropy(model(data()[0]), data()[1])
        if recorded:
            DriftRecorder(model, probe()).record(0)
        loss.backward()
        ends.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.slow
def test_only_the_first_kernel_is_kept_unless_all_are_asked_for() -> None:
    x = torch.randn(150, 5)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    kernel_bytes = 150 * 150 * 4
    for keep, least, most in ((False, 0, 0.2), (True, 7.9, 8.3)):
        recorder = DriftRecorder(model, x, keep_kernels=keep)
        recorder.record(0)
        gc.collect()
        with track() as usage:
            for step in range(1, 9):
                recorder.record(step)
            gc.collect()
        # Eight readings' eigenvalues in float64 are 8 * 150 * 8 bytes, a tenth of a kernel.
        assert least * kernel_bytes <= usage.end <= most * kernel_bytes
    kernels = recorder.result().kernels
    assert kernels is not None
    assert [tuple(K.shape) for K in kernels] == [(150, 150)] * 9


def test_the_probe_set_is_a_copy() -> None:
    model, x = network(), probe()
    recorder = DriftRecorder(model, x)
    recorder.record(0)
    x.zero_()
    assert recorder.record(1).distance == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.b(torch.tanh(self.a(x)))


def test_training_with_reconstruction_is_recorded_by_exact_gradients_and_left_alone() -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(5, 3))
        abyssal.reconstruct(model, abyssal.Code(bits=1), tolerance=1.0)
        recorder = DriftRecorder(model, probe(), keep_kernels=True)
        for step, _ in enumerate(training(model, 4), start=1):
            if recorded:
                recorder.record(step)
        ends.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    kernels = recorder.result().kernels
    assert kernels is not None
    assert torch.equal(kernels[-1], ntk(abyssal.release(model), probe()))


# ---------------------------------------------------------------------- loops of all kinds


def test_a_generator_a_function_of_one_and_a_step_function_record_the_same() -> None:
    found = []
    for kind in range(3):
        torch.manual_seed(0)
        model = network()
        loop = training(model, 4)
        if kind == 0:
            found.append(drift(model, probe(), loop))
        elif kind == 1:

            def steps(loop: Iterator[float] = loop) -> Iterator[float]:
                yield from loop

            found.append(drift(model, probe(), steps))
        else:
            found.append(drift(model, probe(), loop.__next__, steps=4))
    assert found[0].steps == found[1].steps == found[2].steps == (0, 1, 2, 3, 4)
    assert torch.equal(found[0].distance, found[1].distance)
    assert torch.equal(found[0].distance, found[2].distance)


def test_steps_between_readings_or_the_steps_themselves() -> None:
    model = network()
    assert drift(model, probe(), training(model, 7), every=3).steps == (0, 3, 6, 7)
    assert drift(model, probe(), training(model, 9), every={1, 2, 4, 8}).steps == (0, 1, 2, 4, 8, 9)
    assert drift(model, probe(), training(model, 9), steps=4, every=100).steps == (0, 4)


def test_progress_is_told() -> None:
    model, told = network(), []
    drift(model, probe(), training(model, 3), steps=3, progress=lambda *args: told.append(args))
    assert told == [("training", 1, 3), ("training", 2, 3), ("training", 3, 3)]


def test_what_was_recorded_survives_an_exception_in_the_loop() -> None:
    model = network()
    recorder = DriftRecorder(model, probe())
    recorder.record(0)
    with pytest.raises(KeyboardInterrupt):
        for step, _ in enumerate(training(model, 5), start=1):
            recorder.after(step)
            if step == 3:
                raise KeyboardInterrupt
    assert recorder.result().steps == (0, 1, 2, 3)


@pytest.mark.parametrize("keep", [False, True])
def test_a_recording_goes_on_in_another_process(tmp_path: Path, keep: bool) -> None:
    model, y = network(), data(N)[1]
    whole = DriftRecorder(model, probe(), y, keep_kernels=keep)
    loop = enumerate(training(model, 5))
    for step, _ in loop:
        whole.record(step)
        if step == 2:
            torch.save(whole.state_dict(), tmp_path / "drift.pt")
            resumed = DriftRecorder(model, probe(), y, keep_kernels=keep)
            resumed.load_state_dict(torch.load(tmp_path / "drift.pt", weights_only=True))
        elif step > 2:
            resumed.record(step)
    ours, theirs = resumed.result(), whole.result()
    assert ours.to_dict() == theirs.to_dict()
    assert ours.distance[-1] > 0
    assert (ours.kernels is None) == (not keep)
    with pytest.raises(ValueError, match="another probe set"):
        DriftRecorder(model, probe() + 1).load_state_dict(whole.state_dict())


def test_a_loop_that_trains_nothing_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match="3 steps changed no parameter"):
        drift(network(), probe(), range(3))


# ---------------------------------------------------------------------- table, file, plot


@pytest.mark.slow
def test_a_table_a_file_and_a_plot(tmp_path: Path) -> None:
    model = network()
    found = drift(model, probe(), training(model, 30), y=data(N)[1])
    assert len(found) == 31
    text = str(found)
    assert "31 readings" in text
    assert len(text.splitlines()) < 20
    rows = list(csv.DictReader(found.to_csv(tmp_path / "drift.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(31))
    assert [float(row["distance"]) for row in rows] == found.distance.tolist()
    assert {"alignment", "target_alignment", "centred_target_alignment", "effective_rank", "condition"} <= rows[
        0
    ].keys()
    assert found.plot(tmp_path / "drift.png").stat().st_size > 10_000
    json.dumps(found.to_dict(), allow_nan=False)
    bare = drift(model, probe(), training(model, 2), eigenvalues=False)
    assert bare.plot(tmp_path / "bare.svg").stat().st_size > 5000
    for wrong in ("missing/drift.png", "drift.doc"):
        with pytest.raises(ValueError, match=r"folder|end in one of"):
            found.plot(tmp_path / wrong)
    with pytest.raises(ValueError, match="no folder"):
        found.to_csv(tmp_path / "missing" / "drift.csv")


# ---------------------------------------------------------------------- bad input


def one_step() -> None:
    """Does nothing."""


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"trainer_steps": one_step}, ValueError, "say how many"),
        ({"trainer_steps": 100}, TypeError, "generator"),
        ({"trainer_steps": nn.Linear(1, 1)}, TypeError, "generator"),
        ({"trainer_steps": []}, ValueError, "no step at all"),
        ({"trainer_steps": one_step, "steps": 0}, ValueError, "steps has to be"),
        ({"every": 0}, ValueError, "every has to be"),
        ({"every": "often"}, ValueError, "every has to be"),
        ({"y": torch.zeros(N - 1, dtype=torch.long)}, ValueError, rf"{N} samples of x, got \[{N - 1}\]"),
        ({"y": torch.zeros(N)}, ValueError, "not 0 everywhere"),
        ({"y": torch.full((N,), 5), "outputs": "full"}, ValueError, "y has 6 classes or columns, the model has 3"),
        ({"y": torch.randn(N, 3), "outputs": 4}, ValueError, "none for outputs=4"),
        ({"outputs": 7}, ValueError, "has 3 outputs"),
        ({"outputs": "all"}, ValueError, "outputs has to be"),
        ({"model": "resnet"}, TypeError, "torch.nn.Module"),
        ({"model": nn.Tanh()}, ValueError, "no parameters"),
        ({"x": torch.zeros(0, 5)}, ValueError, "no samples"),
        ({"bins": 3}, TypeError, "bins"),
    ],
)
def test_bad_input_is_refused_with_the_reason(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = options.get("model", network())
    given = {"model": model, "x": probe(), "trainer_steps": [None], **options}
    with pytest.raises(error, match=words):
        drift(**given)


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_a_step_that_is_no_number_of_steps_is_refused(step: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        DriftRecorder(network(), probe()).record(step)


def test_steps_have_to_ascend() -> None:
    recorder = DriftRecorder(network(), probe())
    with pytest.raises(ValueError, match=r"record\(0\) before training"):
        recorder.result()
    recorder.record(3)
    with pytest.raises(ValueError, match="step 3 was recorded after step 3"):
        recorder.record(3)


def test_a_kernel_that_is_nothing_at_the_start_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 2), nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    with pytest.raises(ValueError, match="The first kernel is 0"):
        DriftRecorder(model, probe()).record(0)
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        DriftRecorder(model, probe()).record(0)


# ---------------------------------------------------------------------- trainers


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 13, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def gpt() -> Any:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def hf_trainer(model: Any, folder: Path, callbacks: list[Any]) -> Any:
    transformers = import_transformers()
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=7, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=0, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_hugging_faces_callback_records_and_training_stays_the_same_to_the_bit(tmp_path: Path) -> None:
    model = gpt()
    plain = hf_trainer(model, tmp_path, [])
    plain.train()
    from abyssal.integrations.transformers import KernelDrift

    callback = KernelDrift(
        {"input_ids": torch.stack([row["input_ids"] for row in rows(5)])},
        every=3,
        output=lambda found: found.logits[:, -1],
    )
    with pytest.raises(ValueError, match="train"):
        callback.result()
    watched = gpt()
    trainer = hf_trainer(watched, tmp_path, [callback])
    trainer.train()
    torch.testing.assert_close(watched.state_dict(), model.state_dict(), rtol=0, atol=0)
    found = callback.result()
    assert found.steps == (0, 3, 6, 7)
    assert found.distance[-1] > 0.01
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["abyssal/kernel_distance"] for line in lines][2] == pytest.approx(float(found.distance[1]))
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain.state.log_history if "loss" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightnings_callback_records_and_training_stays_the_same_to_the_bit(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from abyssal.integrations.lightning import KernelDrift

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def fit(callbacks: list[Any], epochs: int = 3, ckpt_path: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=2,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module, trainer

    callback = KernelDrift(probe(), data(N)[1], every=4, attribute="network")
    plain, (watched, trainer) = fit([])[0], fit([callback])
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)
    found = callback.result()
    assert found.steps == (0, 4, 8, 9)
    assert trainer.callback_metrics["abyssal/kernel_distance"].item() == pytest.approx(float(found.distance[2]))
    assert found.target_alignment is not None
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = KernelDrift(probe(), data(N)[1], every=4, attribute="network")
    fit([resumed], epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.result().steps == (0, 4, 8, 9, 12)
    assert resumed.result().distance[:4].tolist() == found.distance.tolist()
    with pytest.raises(AttributeError, match=r"KernelDrift\(attribute='body'\)"):
        fit([KernelDrift(probe(), attribute="body")])
