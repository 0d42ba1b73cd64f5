"""Codes are made in pieces, whose size shows in nothing but memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal import memory
from abyssal.codec import quantiser
from abyssal.codec.quantiser import BITS, Codec, Encoded

MEBI = 1 << 20
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "with gaps": lambda x: x[:, ::2],
    "ragged": lambda x: x.flatten()[:-5],
}


def results(codec: Codec, d: Tensor) -> tuple[Encoded, Tensor, Tensor, Tensor]:
    encoded, decoded = codec.encode(d)
    assert torch.equal(codec.decode(encoded, d.dtype), decoded)
    return encoded, decoded, *codec.cell(encoded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_pieces_change_no_bit(bits: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = LAYOUTS[layout](torch.randn(96, 50, dtype=torch.float64))
    encoded, *tensors = results(Codec(bits, 16), d)
    monkeypatch.setattr(quantiser, "_PIECE", 16 * 7)
    same, *others = results(Codec(bits, 16), d)
    assert torch.equal(same.codes, encoded.codes) and torch.equal(same.scales, encoded.scales)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(tensors, others, strict=True))
    monkeypatch.setattr(quantiser, "_PART", 16 * 21)  # folded otherwise: other bytes for the same numbers
    folded, *others = results(Codec(bits, 16), d)
    assert folded.nbytes == encoded.nbytes and torch.equal(folded.scales, encoded.scales)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [16 * 7, 1 << 20])
def test_what_is_left_is_what_the_code_does_not_say(layout: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiser, "_PIECE", piece)
    d = LAYOUTS[layout](torch.randn(96, 50))
    encoded, decoded = Codec(4, 16).encode(d)
    expected = d - decoded
    same, left = Codec(4, 16).take_off(d)
    assert torch.equal(left, expected) and left.stride() == decoded.stride()
    assert torch.equal(same.codes, encoded.codes)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_temporaries_are_small_at_any_size(bits: int) -> None:
    d, codec = torch.randn(40 * MEBI), Codec(bits)
    with memory.track() as encoding:
        encoded, decoded = codec.encode(d)
    assert encoding.peak - encoded.nbytes - decoded.nbytes <= 64 * MEBI
    with memory.track() as decoding:
        decoded = codec.decode(encoded)
    assert decoding.peak - decoded.nbytes <= 64 * MEBI
    with memory.track() as taking:
        codec.take_off(d)
    assert taking.peak - encoded.nbytes <= 64 * MEBI
