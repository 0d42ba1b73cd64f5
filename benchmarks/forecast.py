"""Forecast against measured peak: small networks of four kinds, forecast on fake tensors and run for real.

python benchmarks/forecast.py                              # prints the table; writes results/forecast.json
python benchmarks/forecast.py --write docs/forecast.md     # and replaces the table there
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import abyssal
import report
from abyssal import Code, Keep, Policy, Reverse, memory
from abyssal.models.batches import Example, example_batch
from abyssal.models.load import build_from_config, load_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

METHODS: dict[str, Policy | None] = {
    "plain": None,
    "Keep()": Keep(),
    "Code(4)": Code(4),
    "Code(2, refine=1)": Code(2, refine=1),
    "Reverse(0)": Reverse(0),
}


def gpt2() -> tuple[nn.Module, Example]:
    import transformers

    config = transformers.GPT2Config(
        n_layer=12, n_embd=256, n_head=4, vocab_size=4000, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    model = build_from_config(config)
    return model, example_batch(model, batch_size=2, tokens=512)


def llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Example]:
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=12,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4000,
    )
    model = build_from_config(config, dtype=dtype)
    return model, example_batch(model, batch_size=1, tokens=2048)


def llama_bf16() -> tuple[nn.Module, Example]:
    return llama(torch.bfloat16)


def vit() -> tuple[nn.Module, Example]:
    import transformers

    config = transformers.ViTConfig(
        num_hidden_layers=12,
        hidden_size=192,
        intermediate_size=768,
        num_attention_heads=3,
        image_size=160,
        patch_size=8,
        num_labels=10,
    )
    model = build_from_config(config)
    return model, example_batch(model, batch_size=8)


def convnext() -> tuple[nn.Module, Example]:
    model = load_model("timm:convnext_atto", num_classes=10).model
    return model, example_batch(model, batch_size=16)


def resnet() -> tuple[nn.Module, Example]:
    model = load_model("torchvision:resnet50", num_classes=10).model
    return model, example_batch(model, batch_size=16, image_size=128)


Maker = Callable[[], tuple[nn.Module, Example]]
NETWORKS: dict[str, tuple[str, Maker]] = {
    "GPT-2": ("12 x 256, 2 x 512 tokens", gpt2),
    "Llama": ("12 x 256, 2,048 tokens", llama),
    "Llama, bf16": ("12 x 256, 2,048 tokens", llama_bf16),
    "ViT": ("12 x 192, 8 images of 160, patches of 8", vit),
    "ConvNeXt-atto": ("timm, 16 images of 224", convnext),
    "ResNet-50": ("torchvision, 16 images of 128", resnet),
}


def measured(model: nn.Module, example: Example, policy: Policy | None) -> int:
    """Peak of a real step above parameters, gradients and batch, after one step to warm up."""
    abyssal.release(model) if policy is None else abyssal.reconstruct(model, policy)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def forward() -> Tensor:  # its output, with the logits, is let go before the backward pass
        output: Any = model(**example.batch) if isinstance(example.batch, dict) else model(example.batch)
        loss: Tensor = output.loss if example.loss is None else example.loss(output)
        return loss

    def step() -> None:
        forward().backward()

    with memory.track():
        step()
        gc.collect()
        with memory.track() as used:
            step()
    abyssal.release(model)
    return used.peak


def compare(maker: Maker) -> dict[str, dict[str, float]]:
    """Forecast and measured peak by method."""
    model, example = maker()
    forecast = abyssal.forecast(model, example.batch, loss=example.loss, policies=METHODS)
    found = {}
    for name, policy in METHODS.items():
        real = measured(model, example, policy)
        found[name] = {"forecast": forecast[name].peak_bytes, "measured": real}
    return found


def render(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = []
    for network, cells in results["networks"].items():
        rows.append([f"{network} ({NETWORKS[network][0]})"])
        for name in METHODS:
            cell = cells[name]
            error = cell["forecast"] / cell["measured"] - 1
            rows[-1].append(f"{cell['forecast'] / 1e6:.1f} / {cell['measured'] / 1e6:.1f} ({error:+.1%})")
    table = report.table(["forecast / measured peak, MB", *METHODS], rows)
    return f"{report.header(results['machine'])}\n\n{table}"


@app.command()
def main(
    results: Annotated[Path, typer.Option("--json", help="Where results go.")] = Path(
        "benchmarks/results/forecast.json"
    ),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Forecast, measure, print the table, and write it where asked."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # random weights: only bytes are looked at
    found: dict[str, Any] = {"machine": report.machine(), "networks": {}}
    for name, (_, maker) in NETWORKS.items():
        torch.manual_seed(0)
        found["networks"][name] = compare(maker)
        typer.echo(f"{name}: {found['networks'][name]}", err=True)
    report.save(found, results)
    report.publish(render(found), "forecast", write)


if __name__ == "__main__":
    app()
