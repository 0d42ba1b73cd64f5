"""Models by their spec, batches that fit them, and sizes in bytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from abyssal.models.batches import LoadingError, example_batch
from abyssal.models.load import build_from_config, load_model
from abyssal.profiling.track import peak_bytes
from abyssal.util.text import parse_bytes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def write(folder: Path, source: str) -> Path:
    file = folder / "mine.py"
    file.write_text(textwrap.dedent(source))
    return file


# ---------------------------------------------------------------------- Hugging Face


def test_a_directory_with_a_config_gives_the_class_that_it_names(llama: Path) -> None:
    for spec in (f"hf:{llama}", f"hf:{llama}/config.json"):
        loaded = load_model(spec)
        assert type(loaded.model).__name__ == "LlamaForCausalLM"
        assert loaded.model.training
        assert loaded.name == spec


def test_weights_in_the_directory_are_loaded(llama: Path) -> None:
    saved = load_model(f"hf:{llama}").model
    saved.save_pretrained(llama)
    loaded = load_model(f"hf:{llama}").model
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())
    # Its config.json alone stands for the network, not for the weights.
    other = load_model(f"hf:{llama}/config.json").model.state_dict()
    assert not torch.equal(other["lm_head.weight"], state["lm_head.weight"])


def test_entries_of_a_config_can_be_overridden(llama: Path) -> None:
    assert len(load_model(f"hf:{llama}", num_hidden_layers=5).model.model.layers) == 5
    with pytest.raises(LoadingError, match="has no entry 'depth'"):
        load_model(f"hf:{llama}", depth=5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("GPT2Config", "GPT2LMHeadModel"),
        ("BertConfig", "BertForMaskedLM"),
        ("T5Config", "T5ForConditionalGeneration"),
        ("ViTConfig", "ViTForImageClassification"),
        ("ConvNextV2Config", "ConvNextV2ForImageClassification"),
    ],
)
def test_a_config_that_names_no_class_gets_one_with_a_head(config: str, expected: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert type(build_from_config(getattr(transformers, config)(), empty=True)).__name__ == expected


def test_a_config_without_any_such_class_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(LoadingError, match=r"CLIPTextConfig.*path\.py:function"):
        build_from_config(transformers.CLIPTextConfig(), empty=True)


def test_an_empty_model_of_8b_parameters_takes_no_memory(llama: Path) -> None:
    large = {**LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    (llama / "config.json").write_text(json.dumps({**large, "num_attention_heads": 32, "num_key_value_heads": 8}))
    made = []
    peak = peak_bytes(lambda: made.append(load_model(f"hf:{llama}", empty=True, dtype=torch.bfloat16).model))
    assert sum(parameter.numel() for parameter in made[0].parameters()) == 8_030_261_248
    assert {parameter.dtype for parameter in made[0].parameters()} == {torch.bfloat16}
    assert peak < 2**20


# ---------------------------------------------------------------------- timm, torchvision, files


@pytest.mark.parametrize("empty", [False, True])
def test_vision_models_come_with_images_and_classes_that_fit(empty: bool) -> None:
    pytest.importorskip("timm")
    for spec, side in (("timm:vit_tiny_patch16_224", 224), ("timm:convnext_atto", 224), ("torchvision:resnet18", 224)):
        loaded = load_model(spec, empty=empty, num_classes=7)
        assert all(parameter.is_meta is empty for parameter in loaded.model.parameters())
        example = loaded.example_batch(batch_size=2)
        assert example.batch.shape == (2, 3, side, side)
        if not empty:
            loss = example.loss(loaded.model(example.batch))  # type: ignore[misc]
            assert loss.shape == ()
            assert torch.isfinite(loss)


@pytest.mark.slow
def test_the_image_size_reaches_models_that_depend_on_it() -> None:
    pytest.importorskip("timm")
    for spec in ("timm:vit_tiny_patch16_224", "torchvision:vit_b_16", "timm:resnet18"):
        loaded = load_model(spec, empty=True, image_size=64)
        example = loaded.example_batch(image_size=64)
        assert loaded.model(example.batch.to("meta")).shape == (1, 1000)


def test_a_file_gives_a_model_with_or_without_batch_and_loss(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        import torch
        from of_mine import Net

        def alone(width=3): return Net(width, width)
        def with_batch(): return Net(3, 3), torch.zeros(2, 3)
        def with_loss(): return Net(3, 3), torch.zeros(2, 3), torch.sum
        """,
    )
    (tmp_path / "of_mine.py").write_text("from torch.nn import Linear as Net\n")
    assert load_model(f"{file}:alone", width=5).model.in_features == 5
    assert load_model(f"{file}:alone").own is None
    with_batch, with_loss = load_model(f"{file}:with_batch").own, load_model(f"{file}:with_loss")
    assert with_batch is not None
    assert with_batch.loss is None
    assert with_loss.example_batch(batch_size=99).batch.shape == (2, 3)
    assert with_loss.example_batch().loss is torch.sum


def test_a_factory_that_needs_values_is_built_for_real_and_says_so(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        import torch
        def plain(): return torch.nn.Linear(3, 3)
        def needs_values(): return torch.nn.Linear(3, int(torch.ones(3).sum().item()))
        """,
    )
    plain, real = load_model(f"{file}:plain", empty=True), load_model(f"{file}:needs_values", empty=True)
    assert plain.model.weight.is_meta
    assert plain.note == ""
    assert not real.model.weight.is_meta
    assert "built for real" in real.note


# ---------------------------------------------------------------------- batches


@pytest.mark.slow
def test_tokens_lie_in_the_vocabulary_and_are_their_own_labels(llama: Path) -> None:
    model = load_model(f"hf:{llama}").model
    random = torch.get_rng_state()
    example = example_batch(model, batch_size=2, tokens=300)
    assert torch.equal(torch.get_rng_state(), random)
    ids = example.batch["input_ids"]
    assert ids.shape == (2, 300)
    assert 0 <= int(ids.min()) < int(ids.max()) < 100
    assert torch.equal(ids, example.batch["labels"])
    assert torch.isfinite(model(**example.batch).loss)
    assert torch.equal(example_batch(model, tokens=300, batch_size=2).batch["input_ids"], ids)
    assert not torch.equal(example_batch(model, tokens=300, batch_size=2, seed=1).batch["input_ids"], ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BertForSequenceClassification", {"config": "BertConfig", "num_labels": 3}),
        ("BertForTokenClassification", {"config": "BertConfig", "num_labels": 3}),
        ("T5ForConditionalGeneration", {"config": "T5Config", "decoder_start_token_id": 0}),
        ("ViTForImageClassification", {"config": "ViTConfig", "image_size": 32, "num_labels": 5}),
    ],
)
def test_the_batch_of_each_kind_of_head_gives_a_loss(kind: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    options = dict(options)
    config = getattr(transformers, options.pop("config"))(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50, **options
    )
    if config.model_type == "t5":
        config.num_layers = config.num_decoder_layers = 1
    config.architectures = [kind]
    model = build_from_config(config)
    assert type(model).__name__ == kind
    batch = example_batch(model, batch_size=2).batch
    assert torch.isfinite(model(**batch).loss)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    learned = build_from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=64), empty=True)
    with pytest.raises(LoadingError, match="has 64 learned positions, so 65 tokens do not fit"):
        example_batch(learned, tokens=65)
    assert example_batch(learned).batch["input_ids"].shape == (1, 64)
    rotary = build_from_config(transformers.LlamaConfig(**{**LLAMA, "max_position_embeddings": 64}), empty=True)
    assert example_batch(rotary, tokens=65).batch["input_ids"].shape == (1, 65)


def test_a_model_that_no_batch_is_known_for_is_refused() -> None:
    with pytest.raises(LoadingError, match=r"no batch is known that fits a Linear.*Give a batch and a loss"):
        example_batch(nn.Linear(3, 3))
    with pytest.raises(LoadingError, match="expected at least 1, got 0"):
        example_batch(nn.Linear(3, 3), batch_size=0)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("llama", "expected a prefix and a name"),
        ("onnx:net", "'onnx' is no kind of model known here"),
        ("hf:", "expected a prefix and a name"),
        ("timm:convnext_smal", r"timm has no model of that name\. Near it: .*convnext_small"),
        ("torchvision:resnet1001", r"torchvision has no model of that name\. Near it: .*resnet101"),
        ("hf:meta-llama/Meta-Llama-3-8B", "no such directory, and no model of that name is in the local"),
        ("nowhere.py:make", "there is no file 'nowhere.py'"),
    ],
)
def test_a_spec_that_cannot_be_loaded_says_why(spec: str, said: str) -> None:
    for package in ("transformers", "timm", "torchvision"):
        pytest.importorskip(package)
    with pytest.raises(LoadingError, match=said):
        load_model(spec)


def test_a_directory_without_its_prefix_or_its_config_says_what_to_write(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(LoadingError, match=f"say what kind it is: hf:{tmp_path}"):
        load_model(str(tmp_path))
    with pytest.raises(LoadingError, match=r"has no config\.json"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadingError, match="cannot be read"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def other(): ...", "has no function 'make' that could be called. It has other."),
        ("make = 3", "It defines no function."),
        ("def make(): return 3", r"make\(\) returned int; expected an nn\.Module"),
        ("def make(): return 1, 2", r"make\(\) returned \(int, int\)"),
        ("def make(): return 1, 2, 3, 4", r"returned \(int, int, int, int\)"),
        ("def make(): raise KeyError('weights')", r"make\(\) failed: KeyError"),
        ("import nowhere_at_all", "failed when run: ModuleNotFoundError"),
        ("import sys; sys.exit(0)", "failed when run: SystemExit"),
    ],
)
def test_a_file_that_gives_no_model_says_why(tmp_path: Path, source: str, said: str) -> None:
    file = write(tmp_path, source)
    for empty in (False, True):
        with pytest.raises(LoadingError, match=said):
            load_model(f"{file}:make", empty=empty)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [("hf:somewhere", "transformers", "hf"), ("timm:x", "timm", "vision"), ("torchvision:x", "torchvision", "vision")],
)
def test_a_missing_package_is_named_with_its_extra(
    spec: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(LoadingError, match=rf'{package} is not installed: pip install "abyssal\[{extra}\]"'):
        load_model(spec)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2GiB", 2 * 2**30),
        ("500MB", 500 * 10**6),
        ("2e9", 2 * 10**9),
        ("1.5 gib", 3 * 2**29),
        (" 10 kB ", 10_000),
        ("1TiB", 2**40),
        ("7B", 7),
        ("1_000", 1000),
        (0, 0),
        (1.5e3, 1500),
    ],
)
def test_sizes_are_read(given: str | float, expected: int) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "GiB", "2 G", "2 parsecs", "1,5GB", "1.2.3MB", "-1GB", "inf", -3, float("nan")])
def test_sizes_that_are_none_are_refused(given: str | float) -> None:
    with pytest.raises(ValueError, match="size in bytes: "):
        parse_bytes(given)


@pytest.mark.parametrize("given", [None, True, [3]])
def test_sizes_that_are_no_numbers_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="expected a number or a string such as '2GiB'"):
        parse_bytes(given)


# ---------------------------------------------------------------------- abyssal forecast


def command(*arguments: str) -> Any:
    from abyssal.cli.app import app

    return CliRunner().invoke(app, ["forecast", *arguments])


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(llama: Path) -> None:
    table = command(f"hf:{llama}", "--tokens", "64", "--dtype", "bf16", "--batch", "2")
    assert table.exit_code == 0, table.output
    assert "2 x 64 tokens, bfloat16, 2 residual blocks" in " ".join(table.output.split())
    assert "checkpointing" in table.output
    found = json.loads(command(f"hf:{llama}", "--tokens", "64", "--json").stdout)
    assert [method["name"] for method in found["methods"]][:2] == ["plain", "checkpointing"]
    # A state is 64 tokens x 32 x 4 bytes; and each of two blocks is sampled at no more than 64 places.
    assert 0 <= found["methods"][1]["stream_bytes"] - 2 * 64 * 32 * 4 <= 2 * 64 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "expected a prefix and a name"),
        (["timm:convnext_atto", "--tokens", "8"], "takes images, not tokens"),
        (["timm:convnext_atto", "--dtype", "int7"], "--dtype int7: expected one of bf16"),
        (["timm:convnext_atto", "--blocks", "layers.*"], "matches no module"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], said: str) -> None:
    pytest.importorskip("timm")
    result = command(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("abyssal: ")
    assert result.stderr.count("\n") == 1


def test_a_spec_is_looked_at_before_anything_heavy_is_imported() -> None:
    source = (
        "import sys; from abyssal.cli.app import app; sys.exit('transformers' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0
