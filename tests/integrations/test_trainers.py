"""Where people train: Hugging Face's Trainer with PEFT, Accelerate, Lightning, timm, and plain loops."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abyssal
from abyssal.certify.drift import CODED_ALLOWANCE
from toys.huggingface import import_transformers

LAYERS, WIDTH, TOKENS, BATCH, STEPS = 6, 64, 32, 4, 24
DTYPE_BYTES = 4

# What a gradient that is wrong by a fraction g may do to a loss curve: a step moves the weights by g of itself
# elsewhere, and the loss by g of what the step gains, to first order. So after any number of steps two curves
# differ by at most g of the whole gain; ten times that allows for the error's growth along the way.
# g is the certificate's tolerance on the states.
TOLERANCE = 1e-2
ALLOWED = 10 * TOLERANCE


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # Lightning
        warnings.filterwarnings("ignore", message=".*in eval mode.*")
        yield


def sequences(count: int = 64) -> Tensor:
    """Bytes of Python's own sources. [count, tokens]"""
    text = Path(json.__file__).read_bytes()
    return torch.tensor([list(text[at : at + TOKENS]) for at in range(0, count * TOKENS, TOKENS)])


def rows(batches: int = STEPS) -> list[dict[str, Tensor]]:
    """The same batch again and again, so that what the loss falls by is what was learnt."""
    return [{"input_ids": ids, "labels": ids} for ids in sequences(BATCH)] * batches


def llama() -> nn.Module:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return peft.get_peft_model(model, config)


def pretrained(steps: int = 100) -> nn.Module:
    """A model whose first layers have grown large beside the embedding, as training makes them."""
    model, ids = llama(), sequences()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (8,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Trained once for all tests here."""
    torch.manual_seed(0)
    return {name: value.clone() for name, value in pretrained().state_dict().items()}


def trained_llama(weights: dict[str, Tensor]) -> nn.Module:
    model = llama()
    model.load_state_dict(weights)
    return model


def trainer_of(model: nn.Module, folder: Path, callbacks: list[Any] | None = None, **options: Any) -> Any:
    transformers = import_transformers()
    pytest.importorskip("accelerate")
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(**{**defaults, **options})
    return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(2), callbacks=callbacks)


def losses_of(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def same_curve(ours: list[float], theirs: list[float]) -> None:
    """Assert that two curves differ by at most `ALLOWED` of what training gained; see there."""
    assert len(ours) == len(theirs) > 1
    gained = theirs[0] - theirs[-1]
    assert gained > 0.2, "nothing was learnt, so that the curves cannot differ"
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= ALLOWED * gained, f"{worst:.2e} apart, of {gained:.2f} gained"


# ---------------------------------------------------------------------- Hugging Face's Trainer


def test_lora_in_the_trainer_learns_as_with_gradient_checkpointing(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """The embedding is frozen, so the stream's first input needs no gradient."""
    curves, certificate = {}, None
    for which in ("checkpointing", "ours"):
        model = with_lora(trained_llama(weights))
        if which == "ours":
            abyssal.reconstruct(model)
        trainer = trainer_of(model, tmp_path, gradient_checkpointing=which == "checkpointing", learning_rate=1e-2)
        trainer.train()
        curves[which] = losses_of(trainer)
        if which == "ours":
            certificate = abyssal.certificate(model)
            assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)
    same_curve(curves["ours"], curves["checkpointing"])
    assert certificate is not None
    assert len(certificate.blocks) == LAYERS
    assert not certificate.drifted


def test_adapters_may_come_after_reconstruction(weights: dict[str, Tensor]) -> None:
    found, batch = [], {"input_ids": sequences(BATCH), "labels": sequences(BATCH)}
    for reconstructed in (False, True):
        model = trained_llama(weights)
        if reconstructed:
            abyssal.reconstruct(model, abyssal.Keep())
        model = with_lora(model)
        model(**batch).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all("lora" in name and torch.equal(found[1][name], grad) for name, grad in found[0].items())
    assert all(block.calls == 1 for block in abyssal.certificate(model).blocks)


@pytest.mark.slow
def test_the_stream_stored_in_the_trainer_is_less_than_half_of_checkpointings(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    stored = []
    for policy in (None, abyssal.Keep()):
        model = abyssal.reconstruct(trained_llama(weights), policy)
        trainer_of(model, tmp_path, max_steps=1).train()
        stored.append(abyssal.certificate(model).stored_bytes)
    kept = LAYERS * BATCH * TOKENS * WIDTH * DTYPE_BYTES
    assert stored[1] >= kept
    assert stored[0] < 0.5 * stored[1]  # four codes of at most 8.25 bits of 32, one exact input, half of one: 0.42


@pytest.mark.slow
def test_gradient_checkpointing_asked_of_the_trainer_is_taken_over_by_the_callback(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from abyssal.integrations.transformers import Reconstruct

    plain = trainer_of(trained_llama(weights), tmp_path)
    plain.train()
    model = trained_llama(weights)
    trainer = trainer_of(model, tmp_path, [Reconstruct()], gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="abyssal takes its place"):
        trainer.train()
    assert not model.is_gradient_checkpointing
    same_curve(losses_of(trainer), losses_of(plain))


@pytest.mark.slow
def test_gradient_checkpointing_asked_of_the_trainer_is_told_and_right_without_the_callback(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    plain = trainer_of(trained_llama(weights), tmp_path)
    plain.train()
    model = abyssal.reconstruct(trained_llama(weights))
    trainer = trainer_of(model, tmp_path, gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="gradient checkpointing was enabled after abyssal"):
        trainer.train()
    same_curve(losses_of(trainer), losses_of(plain))
    assert "gradient checkpointing" in abyssal.certificate(model).blocks[0].note


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, abyssal.Keep()], ids=str)
def test_a_run_that_is_stopped_and_resumed_learns_as_one_that_is_not(
    weights: dict[str, Tensor], tmp_path: Path, policy: abyssal.Policy | None
) -> None:
    """To the last bit where nothing is approximate; the default chooses its bits anew, from other weights."""
    model = abyssal.reconstruct(trained_llama(weights), policy)
    whole = trainer_of(model, tmp_path / "whole", save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    again = abyssal.reconstruct(trained_llama(weights), policy)
    resumed = trainer_of(again, tmp_path / "resumed", save_strategy="steps", save_steps=STEPS // 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    same_curve(losses_of(resumed), losses_of(whole))
    if policy is not None:
        assert losses_of(resumed) == losses_of(whole)
        for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_a_checkpoint_of_the_trainer_has_a_plain_models_keys_and_loads_into_one(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = abyssal.reconstruct(trained_llama(weights))
    trainer = trainer_of(
        model,
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=8,
        eval_steps=8,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert set(best) <= set(weights)  # transformers leaves tied weights out
    assert all(torch.equal(model.state_dict()[name], value) for name, value in best.items())
    again = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    ids = sequences()[:2]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.slow
def test_the_trainers_callback_logs_the_certificate_and_gives_the_model_back(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from abyssal.integrations.transformers import Reconstruct

    model = trained_llama(weights)
    trainer = trainer_of(model, tmp_path, [Reconstruct()], gradient_accumulation_steps=2, max_steps=4, logging_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert 0 <= line["abyssal/state_error"] <= CODED_ALLOWANCE * TOLERANCE
        assert line["abyssal/drifted"] == 0
        assert line["abyssal/stored_bytes"] > 0
    with pytest.raises(ValueError, match="not reconstructed"):
        abyssal.certificate(model)


def test_the_trainers_callback_leaves_a_reconstructed_model_as_it_is(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from abyssal.integrations.transformers import Reconstruct

    model = abyssal.reconstruct(trained_llama(weights), {"model.layers.0": abyssal.Store()})
    trainer_of(model, tmp_path, [Reconstruct()], max_steps=1).train()
    assert abyssal.certificate(model).blocks[0].policy == "Store()"


def test_attached_to_a_trainer_its_figures_reach_reporters_that_come_before_callbacks(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from abyssal.integrations.transformers import Reconstruct

    seen: list[dict[str, float]] = []

    class Reporter(import_transformers().TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(trained_llama(weights), tmp_path, [Reporter()], max_steps=1)
    assert isinstance(Reconstruct().attach(trainer), Reconstruct)
    trainer.train()
    assert "abyssal/state_error" in seen[0]


def test_drift_between_two_lines_of_the_log_is_not_lost(weights: dict[str, Tensor], tmp_path: Path) -> None:
    from abyssal.integrations.transformers import Reconstruct

    model = trained_llama(weights)
    callback = Reconstruct(abyssal.Reverse(0), on_drift="keep", tolerance=1e-4)
    trainer = trainer_of(model, tmp_path, [callback], max_steps=4, logging_steps=4)
    with pytest.warns(abyssal.DriftWarning):
        trainer.train()
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    assert line["abyssal/drifted"] >= 1  # in the first step: they are kept from the second on
    assert line["abyssal/state_error"] > 1e-4


# ---------------------------------------------------------------------- Accelerate


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_an_accelerate_loop_with_gradient_accumulation(weights: dict[str, Tensor], mixed_precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    curves, certificate = [], None
    for reconstructed in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is a singleton
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
        model = trained_llama(weights)
        if reconstructed:
            abyssal.reconstruct(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.03)
        loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH)
        model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
        certificate = abyssal.certificate(model) if reconstructed else None
    same_curve(curves[1], curves[0])
    assert certificate is not None and not certificate.drifted


# ---------------------------------------------------------------------- Lightning


def lightning_module(network: nn.Module) -> Any:
    lightning = pytest.importorskip("lightning")

    class Language(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.network(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.03)

    return Language()


def lightning_fit(
    network: nn.Module, callbacks: list[Any], folder: Path, **options: Any
) -> tuple[list[float], list[dict[str, float]], Any]:
    """Fit on all rows once; return losses, what the logger was given, and the module with its trainer."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers.logger import DummyLogger

    class Recorder(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.lines.append(dict(metrics))

    recorder, module = Recorder(), lightning_module(network)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=recorder,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=BATCH))
    return module.losses, [line for line in recorder.lines if "abyssal/stored_bytes" in line], (module, trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=["plain", "bf16", "accumulated"]
)
def test_lightnings_callback_learns_the_same_and_logs(
    weights: dict[str, Tensor], options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    from abyssal.integrations.lightning import Reconstruct

    theirs, none, _ = lightning_fit(trained_llama(weights), [], tmp_path, **options)
    ours, lines, (module, _) = lightning_fit(trained_llama(weights), [Reconstruct()], tmp_path, **options)
    assert not none
    same_curve(ours, theirs)
    steps = len(rows()) // BATCH // options.get("accumulate_grad_batches", 1)
    assert len(lines) == steps
    for line in lines:
        assert 0 <= line["abyssal/state_error"] <= CODED_ALLOWANCE * TOLERANCE
        assert line["abyssal/drifted"] == 0
    with pytest.raises(ValueError, match="not reconstructed"):
        abyssal.certificate(module)


@pytest.mark.slow
def test_lightnings_checkpoints_have_a_plain_modules_keys(weights: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from abyssal.integrations.lightning import Reconstruct

    _, _, (_, trainer) = lightning_fit(
        trained_llama(weights),
        [Reconstruct(abyssal.Keep(), attribute="network")],
        tmp_path,
        enable_checkpointing=True,
    )
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    assert list(saved) == [f"network.{name}" for name in weights]


def test_lightnings_callback_names_the_attributes_there_are(weights: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from abyssal.integrations.lightning import Reconstruct

    with pytest.raises(AttributeError, match=r"'backbone'.*Language has no such module; it has network"):
        lightning_fit(trained_llama(weights), [Reconstruct(attribute="backbone")], tmp_path)


def test_lightnings_callback_gives_the_module_back_after_an_exception(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    from abyssal.integrations.lightning import Reconstruct

    network = trained_llama(weights)
    callback = Reconstruct(abyssal.Reverse(0), on_drift="raise", tolerance=1e-6)
    with pytest.raises(abyssal.DriftError):
        lightning_fit(network, [callback], tmp_path)
    with pytest.raises(ValueError, match="not reconstructed"):
        abyssal.certificate(network)


@pytest.mark.parametrize("installed", ["both", "pytorch_lightning alone"])
def test_lightnings_callback_serves_the_older_name_of_the_package(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    older = pytest.importorskip("pytorch_lightning")
    monkeypatch.delitem(sys.modules, "abyssal.integrations.lightning", raising=False)
    if installed != "both":
        for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"):
            monkeypatch.setitem(sys.modules, name, None)
    callback = importlib.import_module("abyssal.integrations.lightning").Reconstruct(abyssal.Keep())
    seen: list[abyssal.Certificate] = []

    class Module(older.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_llama(weights)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.network(**batch).loss

        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(abyssal.certificate(self))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.03)

    trainer = older.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(rows(2), batch_size=BATCH))
    assert len(seen) == 2
    monkeypatch.delitem(sys.modules, "abyssal.integrations.lightning")


# ---------------------------------------------------------------------- plain loops, timm


@pytest.mark.slow
def test_a_plain_loop_with_clipping_a_schedule_and_evaluation_between(weights: dict[str, Tensor]) -> None:
    curves = []
    for reconstructed in (False, True):
        model = trained_llama(weights)
        if reconstructed:
            abyssal.reconstruct(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        losses, batch = [], sequences(BATCH)
        for _ in range(STEPS):
            loss = model.train()(input_ids=batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            losses.append(loss.item())
            with torch.no_grad():
                model.eval()(input_ids=batch)
        curves.append(losses)
    same_curve(curves[1], curves[0])


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as 32 x 32 colour images. [images, 3, 32, 32] and [images]"""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1), torch.as_tensor(labels)


TIMM = {
    "convnext_atto": {"depths": (2, 2, 4, 2), "dims": (16, 32, 48, 64), "patch_size": 2, "ls_init_value": 1.0},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3},
}


def descend(
    model: nn.Module, optimiser: torch.optim.Optimizer, steps: int, loss_of: Callable[[int], Tensor]
) -> list[float]:
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model_that_is_trained_on_learns_the_same(name: str) -> None:
    """After a plain start: the first steps from random weights are chaotic, in bfloat16 just so."""
    timm = pytest.importorskip("timm")
    images, labels = digits()
    torch.manual_seed(0)
    started = timm.create_model(name, num_classes=10, **TIMM[name])

    def loss_of(model: nn.Module, step: int) -> Tensor:
        chosen = torch.randint(len(labels), (32,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    descend(started, torch.optim.AdamW(started.parameters(), lr=1e-3), 60, lambda step: loss_of(started, step))
    curves, stored = [], []
    for policy in ("plain", abyssal.Keep(), None):
        model = copy.deepcopy(started)
        if policy != "plain":
            abyssal.reconstruct(model, policy)
        curves.append(
            descend(model, torch.optim.SGD(model.parameters(), lr=0.03), 20, lambda step: loss_of(model, 1000))  # noqa: B023
        )
        if policy != "plain":
            stored.append(abyssal.certificate(model).stored_bytes)
    assert curves[1] == curves[0]
    same_curve(curves[2], curves[0])
    assert stored[1] < stored[0]


# ---------------------------------------------------------------------- the page that tells of all this

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def sections() -> dict[str, str]:
    """The code of each section of docs/trainers.md."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    code = {
        title: "\n".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: lines for title, lines in code.items() if lines}


@pytest.mark.parametrize("title", sections())
def test_what_the_page_tells_people_to_type_runs(
    title: str, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs where it stands
    warnings.filterwarnings("ignore", module="lightning")
    model = trained_llama(weights)
    names: dict[str, Any] = {"abyssal": abyssal, "model": model, "data": rows(2)}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.01)
    names["loader"] = torch.utils.data.DataLoader(rows(2), batch_size=BATCH)
    if "Hugging Face" in title:
        names["Trainer"] = import_transformers().Trainer
        names["arguments"] = trainer_of(model, tmp_path, max_steps=2).args
    elif title in ("PEFT", "Accelerate", "timm and torchvision"):
        module = {"timm and torchvision": "timm"}.get(title, title.lower())
        names[module] = pytest.importorskip(module)
        if title == "Accelerate":
            names["accelerator"] = names[module].Accelerator(cpu=True)
    elif title == "Lightning":
        names["lightning"] = pytest.importorskip("lightning")
        names["module"] = lightning_module(model)
    exec(compile(sections()[title], str(PAGE), "exec"), names)
    if "trainer" not in names:
        assert abyssal.certificate(names["model"]).blocks
