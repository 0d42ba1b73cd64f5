"""Images to train on: scikit-learn's digits, which are there, and MNIST and CIFAR-10, which have to be got.

Pixels lie between -1 and 1 for digits and MNIST; CIFAR-10's channels have mean 0 and variance 1 over the training
images, as the papers that train on it have them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from abyssal.demo.digits import MissingPackageError, load_digits
from abyssal.util.checks import whole

__all__ = ["CropAndFlip", "DataError", "Dataset", "Name", "data_folder", "dataset", "minibatches"]

Name = Literal["digits", "mnist", "cifar10"]
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the 50,000 training images


class DataError(RuntimeError):
    """Images that are neither on disk nor could be downloaded; the message says where to put them."""


@dataclass(frozen=True)
class CropAndFlip:
    """The augmentation of the CIFAR papers: pad with black, crop at random, and mirror half of the images.

    Args:
        padding: pixels at each side.
        flip: whether to mirror; not for digits.
        fill: the value of black.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2: 4 pixels, and flips.
    """

    padding: int = 4
    flip: bool = True
    fill: float | tuple[float, ...] = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return new images; each is moved and mirrored by itself.

        Args:
            images: [batch, channels, height, width]
            generator: on the CPU.
        """
        batch, channels, height, width = images.shape
        fill = torch.tensor(self.fill, dtype=images.dtype, device=images.device).expand(channels)[:, None, None]
        padded = F.pad(images - fill, [self.padding] * 4) + fill
        down, right = torch.randint(2 * self.padding + 1, (2, batch, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        index = torch.arange(batch)[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: "digits", "mnist" or "cifar10".
        train_images: [train, channels, height, width]
        train_labels: [train]
        test_images: [test, channels, height, width]
        test_labels: [test]
        augment: what the papers that train on these images do to a minibatch; None is nothing.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: CropAndFlip | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1

    def first(self, train: int | None = None, test: int | None = None) -> Dataset:
        """Return the same with the first so many images of each part only."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


def data_folder() -> Path:
    """Return where MNIST and CIFAR-10 are looked for: $ABYSSAL_DATA, else ~/.cache/abyssal-data."""
    return Path(os.environ.get("ABYSSAL_DATA") or Path.home() / ".cache" / "abyssal-data")


def dataset(
    name: Name = "digits",
    *,
    folder: str | Path | None = None,
    download: bool = True,
    seed: int = 0,
    test_share: float = 0.2,
    size: int | None = None,
) -> Dataset:
    """Load images and their labels.

    Args:
        name: "digits", 1,797 images of 8 x 8 pixels that come with scikit-learn; "mnist", 70,000 of 28 x 28;
            "cifar10", 60,000 in colour of 32 x 32. The last two are read by torchvision.
        folder: where torchvision keeps them; None is `data_folder()`.
        download: whether to download them if they are not there.
        seed: of the split of the digits, which have no test set of their own.
        test_share: the share of the digits held back.
        size: height and width to resize to; None leaves them.

    Raises:
        ValueError: for another name, or a size below 1.
        MissingPackageError: if scikit-learn or torchvision is not installed.
        DataError: if the images are not there and cannot be downloaded; it says which folder to put them into.
    """
    if name not in get_args(Name):
        raise ValueError(f"There is no dataset {name!r} here. There are: {', '.join(get_args(Name))}.")
    if size is not None:
        whole("size", size, expected="a whole number of pixels,")
    if name == "digits":
        held = load_digits(test_share, seed)
        found = Dataset(
            "digits",
            *(held.train_images, held.train_labels, held.test_images, held.test_labels),
            augment=CropAndFlip(padding=1, flip=False, fill=-1.0),
        )
    else:
        found = _from_torchvision(name, Path(folder) if folder is not None else data_folder(), download)
    return found if size is None else _resized(found, size)


def minibatches(
    data: Dataset, batch: int, epochs: int, seed: int = 0, *, augment: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled minibatches, whole ones only; the same for the same seed.

    Args:
        data: the images.
        batch: images per minibatch.
        epochs: passes over the training images.
        seed: of order and augmentation.
        augment: whether to use the dataset's augmentation.

    Raises:
        ValueError: if there are fewer training images than a minibatch has.
    """
    count = len(data.train_labels)
    if not 1 <= batch <= count:
        raise ValueError(f"batch has to be between 1 and the {count} training images, got {batch}.")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            chosen = order[start : start + batch]
            images = data.train_images[chosen]
            if augment and data.augment is not None:
                images = data.augment(images, generator)
            yield images, data.train_labels[chosen]


def _resized(data: Dataset, size: int) -> Dataset:
    def resize(images: Tensor) -> Tensor:
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)

    augment = data.augment
    if augment is not None:  # as large a part of the image as before
        augment = replace(augment, padding=max(1, round(augment.padding * size / data.image[1])))
    return replace(data, train_images=resize(data.train_images), test_images=resize(data.test_images), augment=augment)


def _from_torchvision(name: str, folder: Path, download: bool) -> Dataset:
    try:
        from abyssal.models.torchvision import import_torchvision

        datasets = import_torchvision().datasets
    except ImportError as error:
        raise MissingPackageError(
            f'{name} is read by torchvision, which is not installed: pip install "abyssal[vision]"'
        ) from error
    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    train_images, train_labels = _as_tensors(_load(kind, name, folder, True, download), name)
    test_images, test_labels = _as_tensors(_load(kind, name, folder, False, download), name)
    found = Dataset(name, train_images, train_labels, test_images, test_labels)
    if name == "mnist":
        return found
    black = tuple(-mean / std for mean, std in zip(_CIFAR_MEAN, _CIFAR_STD, strict=True))
    return replace(found, augment=CropAndFlip(4, True, black))


def _load(kind: Any, name: str, folder: Path, train: bool, download: bool) -> Any:
    try:
        return kind(folder, train=train, download=False)
    except RuntimeError as missing:
        if not download:
            raise DataError(_missing(name, folder, "and download=False says not to get it")) from missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return kind(folder, train=train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        why = str(error).strip().splitlines()
        raise DataError(_missing(name, folder, f"and downloading it failed ({why[-1] if why else error!r})")) from error


def _missing(name: str, folder: Path, why: str) -> str:
    where, what = (
        ("MNIST/raw", "train-images-idx3-ubyte and the three files beside it, unpacked")
        if name == "mnist"
        else ("cifar-10-batches-py", "data_batch_1 to data_batch_5, test_batch and batches.meta of the python version")
    )
    return (
        f"{name} is not in {folder}, {why}. On a machine with access to the internet run\n"
        f'    python -c "from abyssal.papers.data import dataset; dataset({name!r})"\n'
        f"and copy what is then in its folder ({folder / where}: {what}) to here, or set ABYSSAL_DATA or folder= to "
        'where it is. dataset("digits") needs no download.'
    )


def _as_tensors(part: Any, name: str) -> tuple[Tensor, Tensor]:
    labels = torch.as_tensor(part.targets, dtype=torch.int64)
    pixels = torch.as_tensor(part.data)
    if name == "mnist":
        return pixels[:, None].float() / 127.5 - 1, labels
    mean, std = (torch.tensor(values)[:, None, None] for values in (_CIFAR_MEAN, _CIFAR_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std, labels
