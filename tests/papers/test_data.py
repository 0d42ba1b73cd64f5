"""Images: the digits are there, others are read from disk or refused with what to do, and augmentation moves them."""

from __future__ import annotations

import pickle
import sys
import urllib.error

import numpy as np
import pytest
import torch

from abyssal.demo.digits import MissingPackageError
from abyssal.models.torchvision import import_torchvision
from abyssal.papers.data import CropAndFlip, DataError, dataset, minibatches


def test_digits_are_the_default():
    data = dataset()
    assert (data.name, data.image, data.classes) == ("digits", (1, 8, 8), 10)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert float(data.train_images.min()) == -1 and float(data.train_images.max()) == 1
    small = data.first(100, 50)
    assert small.train_images.shape == (100, 1, 8, 8) and small.test_labels.shape == (50,)
    assert dataset(size=16).image == (1, 16, 16)
    assert dataset(size=16).augment.padding == 2


def test_crops_are_parts_of_the_padded_image_and_flips_mirror_it():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    augment = CropAndFlip(padding=1, flip=True, fill=(-1.0, -2.0, -3.0))
    padded = torch.cat([torch.nn.functional.pad(images[:, c], [1] * 4, value=-1.0 - c)[:, None] for c in range(3)], 1)
    possible = [
        {crop.numpy().tobytes() for y in range(3) for x in range(3) for crop in _both(image[:, y : y + 4, x : x + 4])}
        for image in padded
    ]
    generator, seen = torch.Generator().manual_seed(0), [set(), set()]
    for _ in range(200):
        out = augment(images, generator)
        assert out.shape == images.shape
        for n, image in enumerate(out):
            seen[n].add(image.numpy().tobytes())
    assert seen == possible  # 18 each: a draw of 200 misses one with probability 1e-4


def _both(crop):
    return crop.contiguous(), crop.flip(2).contiguous()


def test_without_flip_nothing_is_mirrored():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    generator = torch.Generator().manual_seed(0)
    assert all(torch.equal(CropAndFlip(0, False)(image, generator), image) for _ in range(20))


def test_minibatches_depend_on_their_seed_alone_and_pass_over_all_images():
    data = dataset().first(90)
    first, again, other = (list(minibatches(data, 30, 2, seed)) for seed in (0, 0, 1))
    assert len(first) == 6
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    plain = torch.cat([images for images, _ in minibatches(data, 30, 1, augment=False)])
    torch.testing.assert_close(plain.sum(0), data.train_images.sum(0))  # in another order
    with pytest.raises(ValueError, match="between 1 and the 90"):
        next(minibatches(data, 91, 1))


def test_cifar10_is_read_from_disk(tmp_path, monkeypatch):
    torchvision = import_torchvision()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{n}", 6) for n in range(1, 6)), ("test_batch", 4)]:
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": [n % 10 for n in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = dataset("cifar10", folder=tmp_path, download=False)
    assert data.train_images.shape == (30, 3, 32, 32) and data.test_images.shape == (4, 3, 32, 32)
    black = (torch.zeros(3) - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2470, 0.2435, 0.2616])
    assert torch.allclose(torch.tensor(data.augment.fill), black)
    last = torch.as_tensor(pixels).view(4, 3, 32, 32)  # the test batch was written last
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(data.test_images, (last / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert data.test_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "where"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")])
def test_missing_images_are_refused_with_what_to_do(name, where, tmp_path, monkeypatch):
    torchvision = import_torchvision()
    with pytest.raises(DataError, match="download=False says not to") as caught:
        dataset(name, folder=tmp_path, download=False)
    assert where in str(caught.value) and "ABYSSAL_DATA" in str(caught.value)

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    monkeypatch.setenv("ABYSSAL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"downloading it failed.*no route to host") as caught:
        dataset(name)
    assert str(tmp_path / "elsewhere") in str(caught.value)
    assert f"dataset('{name}')" in str(caught.value)


def test_what_is_no_dataset_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="digits, mnist, cifar10"):
        dataset("imagenet")
    with pytest.raises(ValueError, match="whole number of pixels"):
        dataset(size=0)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"abyssal\[demo\]"):
        dataset()
