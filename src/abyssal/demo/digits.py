"""Scikit-learn's digits: 1,797 real images of 8 x 8 pixels, shipped with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Digits", "MissingPackageError", "load_digits"]

_LARGEST = 16.0  # pixels run from 0 to 16


class MissingPackageError(ImportError):
    """A package that only this study needs is not installed."""


@dataclass(frozen=True)
class Digits:
    """The images, split once and for all.

    Attributes:
        train_images: [train, 1, 8, 8], between -1 and 1
        train_labels: [train]
        test_images: [test, 1, 8, 8]
        test_labels: [test]
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(test_share: float = 0.2, seed: int = 0) -> Digits:
    """Load the images and hold some back for testing.

    Args:
        test_share: the share held back.
        seed: of the split.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingPackageError(
            'The demo\'s images come with scikit-learn, which is not installed: pip install "abyssal[demo]"'
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / (_LARGEST / 2) - 1
    targets = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    held = round(test_share * len(targets))
    test, train = order[:held], order[held:]
    return Digits(images[train], targets[train], images[test], targets[test])
