"""A model that knows nothing of abyssal: timm's ConvNeXt on scikit-learn's digits, with and without.

    .venv/bin/python examples/any_model.py                      # seconds

The losses agree, the certificate says how well each block's input was restored, and the peak shows what it
saves. A model trained from scratch with LayerScale at 1e-6, as here, has small branches: `Reverse` is at home.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import abyssal
from abyssal.models.torchvision import import_torchvision
from abyssal.profiling.track import track

import_torchvision()  # only where PyPI's torchvision stands beside a CPU build of torch: its import fails there
from timm.models.convnext import ConvNeXt  # noqa: E402


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits as 32 x 32 colour images. [images, 3, 32, 32] and [images]"""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1), torch.as_tensor(labels)


def train(policy: abyssal.Policy | None, steps: int = 12) -> tuple[list[float], int, ConvNeXt]:
    """Train from the same start on the same batches; return losses, the last step's peak, and the model."""
    torch.manual_seed(0)
    model = ConvNeXt(num_classes=10, depths=(2, 2, 12, 2), dims=(16, 32, 64, 128), patch_size=2)
    if policy is not None:
        abyssal.reconstruct(model, policy)  # this line is all; the blocks are found by themselves
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, labels = images_and_labels()
    losses = []
    for step in range(steps + 1):
        batch = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, so that the peak is of activations
        if step == steps:
            with track() as memory:
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
        else:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, memory.peak, model


def main() -> tuple[list[float], list[float], int, int, abyssal.Certificate]:
    """Train plainly and reconstructed; print and return losses, peaks and the certificate."""
    plain, plain_peak, _ = train(None)
    ours, our_peak, model = train(abyssal.Reverse(refine=1))
    for step in range(0, len(plain), 3):
        print(f"step {step:2}: loss {plain[step]:.6f} plain, {ours[step]:.6f} reconstructed")
    certificate = abyssal.certificate(model)
    print(certificate)
    print(f"peak of one step's activations: {plain_peak / 1e6:.1f} MB plain, {our_peak / 1e6:.1f} MB reconstructed")
    return plain, ours, plain_peak, our_peak, certificate


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors as small as these, threads cost more than they give
    main()
