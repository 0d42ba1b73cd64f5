"""The code of the increments: its bytes, its bounds, what it does beside outliers, and that decoding is exact."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from abyssal.codec.packing import pack, packed_bytes, unpack
from abyssal.codec.quantiser import BITS, Codec, Encoded

WITH_ZERO = tuple(bits for bits in BITS if bits > 2)  # 1 and 2 bits have levels with or without zero, by the group
SCALE_ROUNDING = 2.0**-8  # of bfloat16, relative: 8 significant bits, the nearest of them
TAGGED_ROUNDING = 3 * SCALE_ROUNDING  # where the last of these bits says which levels a group has
SLACK = 2e-5  # of a step: float32 rounds a quotient and a scale of up to 128 steps, 2^-24 relative each
DTYPES = (torch.float32, torch.float64)

codecs = st.builds(Codec, st.sampled_from(BITS), st.integers(2, 128).map(lambda n: 8 * n))
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Increments of any shape, dtype, memory layout and size, with outliers in some."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    order = draw(st.permutations(range(len(shape))))
    stored = torch.randn([shape[axis] for axis in order], generator=generator, dtype=dtype)
    d = stored.permute([order.index(axis) for axis in range(len(shape))])
    if draw(st.booleans()):
        d = d * torch.rand(shape, generator=generator, dtype=dtype).reciprocal().clamp_max(1e6)
    return d * 10.0 ** draw(st.integers(-30, 30))


def largest_of_groups(d: Tensor, group: int) -> Tensor:
    """Of a flat tensor: for each element, the largest magnitude in its group."""
    return torch.cat([part.abs().max().expand_as(part) for part in d.split(group)])


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 64, 72, 1024])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 4096])
def test_a_group_takes_its_bits_and_two_bytes_of_scale(bits: int, group: int, numel: int) -> None:
    codec = Codec(bits, group)
    encoded, _ = codec.encode(torch.randn(numel))
    groups = math.ceil(numel / group)
    assert encoded.codes.dtype == torch.uint8
    assert encoded.codes.untyped_storage().nbytes() == encoded.codes.nbytes == groups * group * bits // 8
    assert encoded.scales.untyped_storage().nbytes() == encoded.scales.nbytes == 2 * groups
    assert encoded.nbytes == codec.nbytes(numel) == groups * (group * bits // 8 + 2)


def test_four_bits_take_less_than_0_28_of_a_bf16_stream() -> None:
    assert Codec(4).nbytes(2**20) == 0.265625 * (2 * 2**20)


@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_packing_loses_nothing(bits: int, eights: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (8 * eights,), generator=generator, dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(len(values), bits) == eights * bits
    assert torch.equal(unpack(packed, bits), values)


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_each_value_at_each_place(bits: int) -> None:
    for value in range(2**bits):
        for place in range(16):
            values = torch.zeros(16, dtype=torch.uint8)
            values[place] = value
            assert torch.equal(unpack(pack(values, bits), bits), values)


@pytest.mark.parametrize("bits", WITH_ZERO)
def test_every_level_is_used_and_comes_back(bits: int) -> None:
    half = 2 ** (bits - 1)
    levels = torch.arange(-half, half).float()
    codec = Codec(bits, 256)
    encoded, decoded = codec.encode(levels)
    assert torch.equal(decoded, levels)  # the extreme is -half, so the step is exactly 1
    assert torch.equal(codec.decode(encoded), levels)


# ---------------------------------------------------------------- decoding


@given(codecs, tensors())
@settings(deadline=None, max_examples=200)
def test_the_decoder_makes_what_the_encoder_said_to_the_bit(codec: Codec, d: Tensor) -> None:
    before = d.clone()
    encoded, decoded = codec.encode(d)
    assert torch.equal(d, before)
    again = codec.decode(encoded, d.dtype)
    assert torch.equal(again, decoded)
    assert decoded.shape == again.shape == d.shape
    assert decoded.stride() == again.stride() == d.stride()
    assert decoded.dtype == again.dtype == d.dtype
    assert encoded.nbytes == codec.nbytes(d.numel())


@given(codecs, tensors())
@settings(deadline=None, max_examples=200)
def test_an_element_lies_in_the_cell_that_its_code_names(codec: Codec, d: Tensor) -> None:
    encoded, decoded = codec.encode(d)
    low, high = codec.cell(encoded)
    assert low.shape == high.shape == d.shape and low.stride() == high.stride() == d.stride()
    wrong = d - decoded
    slack = SLACK * (high - low).nan_to_num(posinf=0.0)
    assert bool((low - slack <= wrong).all()) and bool((wrong <= high + slack).all())
    assert bool((low <= 0).all()) and bool((high >= 0).all())


@given(st.sampled_from(BITS), st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(-25, 25))
@settings(deadline=None)
def test_error_is_at_most_half_a_step_and_one_step_opposite_the_extreme(
    bits: int, seed: int, dtype: torch.dtype, power: int
) -> None:
    d = torch.randn(640, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 10.0**power
    _, decoded = Codec(bits).encode(d)
    half, rounding = 2 ** (bits - 1), SCALE_ROUNDING if bits in WITH_ZERO else TAGGED_ROUNDING
    largest = largest_of_groups(d, 64)
    step = largest * (1 + rounding) / half
    wrong = (d - decoded).abs() / step
    assert wrong.max() <= 1 + rounding * half + SLACK
    # Within reach of the highest level's half step, though the scale may have been rounded down.
    inner = d.abs() / step <= half - 0.5 - 2 * rounding * half
    assert wrong[inner].max() <= 0.5 + SLACK
    if bits in WITH_ZERO:
        extreme = d.abs() == largest
        assert ((d - decoded).abs() / largest)[extreme].max() <= max(rounding, 0.5 / half)


def bfloat16_of(value: float) -> float:
    """The nearest bfloat16, ties to even, by its bits."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    word += 0x7FFF + (word >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", word & 0xFFFF0000))[0]


def decoded_slowly(d: list[float], bits: int, group: int) -> list[tuple[float, bool]]:
    """The code written out, an element at a time; and whether the element is too close to a border to tell."""
    found = []
    for first in range(0, len(d), group):
        part = d[first : first + group]
        half, extreme = 2 ** (bits - 1), max(part, key=abs)
        scale = bfloat16_of(-extreme)
        outlier = abs(extreme) > 4 * sum(map(abs, part)) / len(part)
        if bits <= 2:
            scale = with_last_bit(scale, outlier)
        offset = 0.5 if bits <= 2 and not outlier else 0.0
        for v in part:
            place = v * half / scale - offset
            level = min(max(round(place), -half), half - 1)
            found.append(((level + offset) * scale / half, abs(abs(place - math.floor(place)) - 0.5) < SLACK))
    return found


def with_last_bit(value: float, bit: bool) -> float:
    """A bfloat16 with its last bit set to this."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", word & 0xFFFE0000 | bit << 16))[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 64])
def test_the_code_is_the_one_written_out_in_loops(bits: int, group: int) -> None:
    d = torch.randn(2048).mul(torch.rand(2048).reciprocal().clamp_max(1e3))
    _, decoded = Codec(bits, group).encode(d)
    twin = decoded_slowly(d.tolist(), bits, group)
    wrong = [(a, b) for a, (b, unsure) in zip(decoded.tolist(), twin, strict=True) if not unsure and a != b]
    assert not wrong, wrong[:3]
    assert sum(unsure for _, unsure in twin) <= 4


@given(st.sampled_from(BITS), st.integers(0, 2**31))
@settings(deadline=None)
def test_the_code_of_the_negative_is_the_negative(bits: int, seed: int) -> None:
    d = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    codec = Codec(bits)
    assert torch.equal(codec.encode(-d)[1], -codec.encode(d)[1])


@pytest.mark.parametrize("bits", BITS)
def test_it_is_deterministic_and_leaves_the_random_state_alone(bits: int) -> None:
    d, state = torch.randn(1000), torch.get_rng_state()
    first, second = Codec(bits).encode(d)[0], Codec(bits).encode(d)[0]
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- outliers, and the closed loop


@pytest.mark.parametrize("bits", BITS)
def test_beside_an_outlier_small_elements_wait_and_are_not_made_worse(bits: int) -> None:
    d = 0.1 * torch.randn(64).clamp(-1, 1)
    for outlier in (50.0, -50.0):
        d[17] = outlier
        _, decoded = Codec(bits).encode(d)
        assert abs(decoded[17] - outlier) <= 50 * (SCALE_ROUNDING if bits in WITH_ZERO else TAGGED_ROUNDING)
        others = torch.arange(64) != 17
        assert decoded[others].eq(0).all()


@pytest.mark.parametrize(("bits", "usual"), [(1, [-0.5, 0.5]), (2, [-0.75, -0.25, 0.25, 0.75])])
def test_few_bits_have_a_level_at_zero_in_groups_with_an_outlier_and_only_there(bits: int, usual: list[float]) -> None:
    d = torch.linspace(-1, 1, 64).repeat(2)
    d[64:] *= 0.01
    d[100] = -1.0
    _, decoded = Codec(bits).encode(d)
    assert decoded[:64].unique().tolist() == pytest.approx(usual, rel=TAGGED_ROUNDING)
    assert decoded[64:].unique().tolist() == pytest.approx([-1.0, 0.0], rel=TAGGED_ROUNDING)


def closed_loop(codec: Codec, states: list[Tensor]) -> list[Tensor]:
    """The states as a decoder restores them from the last: the loop in a few lines, its residual in float32."""
    residual, codes = torch.zeros_like(states[0]), []
    for before, x in pairwise(states):
        d = x - before + residual
        encoded, decoded = codec.encode(d)
        codes.append(encoded)
        residual = d - decoded
    restored = [states[-1] - residual]
    for encoded in reversed(codes):
        restored.append(restored[-1] - codec.decode(encoded))
    return restored[::-1]


def stream(depth: int, channel: float = 1.0, spike: float = 0.0) -> list[Tensor]:
    """A random walk over depth with increments of 0.1; one channel may move faster, one element may jump at first."""
    steps = 0.1 * torch.randn(depth + 1, 32, 128)
    steps[:, :, 7] *= channel
    steps[1, 3, 9] += spike
    return list(steps.cumsum(0))


def errors(codec: Codec, states: list[Tensor], without: int | None = None) -> list[float]:
    """The largest error of each state, leaving out a channel."""
    kept = [c for c in range(128) if c != without]
    pairs = zip(closed_loop(codec, states), states, strict=True)
    return [float((restored - x)[:, kept].abs().max()) for restored, x in pairs]


@pytest.mark.parametrize("bits", BITS)
def test_error_does_not_accumulate_over_64_blocks(bits: int) -> None:
    found = errors(Codec(bits), stream(64))
    assert found[0] <= 1e-4  # the state where the loop started: exact, but for float32's sums
    assert max(found[61:65]) <= 1.5 * max(found[1:5])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_beside_an_outlier_channel_stays_within_half_a_step_of_it(bits: int) -> None:
    states = stream(64, channel=500.0)
    fastest = max(float((x - before).abs().max()) for before, x in pairwise(states))
    # The channel's own residual, at most a step of the block before, adds to its next increment.
    half_step = 0.5 * fastest * (1 + 2.0 ** (1 - bits)) * (1 + SCALE_ROUNDING) / 2 ** (bits - 1)
    found = errors(Codec(bits), states, without=7)
    assert max(found) <= half_step
    assert max(found[1:5]) <= 4 * 4 * 0.1 * 1.5 or bits > 4  # four random increments at most, none made worse


@pytest.mark.parametrize(("bits", "blocks"), [(1, 4), (2, 4), (3, 2), (4, 2), (6, 2), (8, 2)])
def test_a_spike_is_forgotten_within_a_few_blocks(bits: int, blocks: int) -> None:
    torch.manual_seed(1)
    usual = errors(Codec(bits), stream(16))
    torch.manual_seed(1)
    spiked = errors(Codec(bits), stream(16, spike=50.0))
    assert spiked[1] <= 10 * 0.1  # its neighbours lost one increment each, no more
    assert max(spiked[1 + blocks :]) <= 1.5 * max(usual)


# ---------------------------------------------------------------- the ends of the range


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_decode_to_zeros_also_beside_other_groups(bits: int, dtype: torch.dtype) -> None:
    d = torch.randn(4, 64, dtype=dtype)
    d[2] = 0
    encoded, decoded = Codec(bits).encode(d)
    assert decoded[2].eq(0).all() and Codec(bits).decode(encoded, dtype)[2].eq(0).all()
    low, high = Codec(bits).cell(encoded)
    assert low[2].eq(0).all() and high[2].eq(0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_group_with_a_value_that_is_not_finite_decodes_to_nan_and_no_other_does(bits: int, bad: float) -> None:
    d = torch.randn(4, 64)
    d[1, 5] = bad
    encoded, decoded = Codec(bits).encode(d)
    for found in (decoded, Codec(bits).decode(encoded)):
        assert found[1].isnan().all()
        assert found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-35, 1e-30, 1e30, 1e37, 1e38, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_increments_are_coded_as_others_are(bits: int, size: float, dtype: torch.dtype) -> None:
    pattern = torch.rand(8, 64).mul_(2).sub_(1)
    d = (pattern / pattern.abs().max()).to(dtype) * size
    encoded, decoded = Codec(bits).encode(d)
    assert decoded.isfinite().all()
    wrong = (d.double() - decoded).abs().max().item()
    step = max(size, 2.0**-118) * (1 + SCALE_ROUNDING) / 2 ** (bits - 1)  # what is smaller has the step of 2^-118
    assert wrong <= (1 + TAGGED_ROUNDING * 2 ** (bits - 1)) * step
    assert torch.equal(Codec(bits).decode(encoded, dtype), decoded)


# ---------------------------------------------------------------- layouts, devices, tracing


def test_groups_follow_the_order_of_memory() -> None:
    image = torch.randn(2, 24, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    encoded, decoded = Codec(4, 16).encode(last)
    plain, _ = Codec(4, 16).encode(last.permute(0, 2, 3, 1))
    assert torch.equal(encoded.codes, plain.codes) and torch.equal(encoded.scales, plain.scales)
    assert decoded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 50, 64)[:, ::2],
        lambda: torch.randn(50, 3, 64).transpose(0, 1)[..., 1:],
        lambda: torch.randn(4, 1).expand(4, 100),
        lambda: torch.randn(200)[7:131],
        lambda: torch.randn(()),
        lambda: torch.randn(3, 0, 5),
    ],
    ids=["strided", "sliced-transposed", "expanded", "offset", "scalar", "empty"],
)
def test_a_tensor_with_gaps_is_coded_like_its_dense_copy(bits: int, make: object) -> None:
    d = make()
    dense = torch.empty_like(d).copy_(d)  # torch's own idea of which dense layout is nearest
    encoded, decoded = Codec(bits).encode(d)
    expected, same = Codec(bits).encode(dense)
    assert torch.equal(encoded.codes, expected.codes) and torch.equal(decoded, same)
    assert decoded.shape == d.shape and decoded.untyped_storage().nbytes() >= decoded.nbytes


def test_no_graph_is_kept() -> None:
    for d in (torch.randn(4, 64), torch.randn(4, 128)[:, ::2]):
        encoded, decoded = Codec(4).encode(d.requires_grad_(d.is_leaf))
        assert not decoded.requires_grad and not encoded.scales.requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_it_runs_without_data(bits: int) -> None:
    codec, shape = Codec(bits), (3, 5, 31)
    encoded, decoded = codec.encode(torch.empty(shape, device="meta"))
    assert decoded.device.type == "meta" and encoded.nbytes == codec.nbytes(3 * 5 * 31)
    with FakeTensorMode():
        encoded, decoded = codec.encode(torch.empty(shape).transpose(0, 2))
        assert encoded.nbytes == codec.nbytes(3 * 5 * 31)
        assert codec.decode(encoded).stride() == decoded.stride() == torch.empty(shape).transpose(0, 2).stride()
        assert codec.cell(encoded)[0].shape == decoded.shape


def test_the_code_can_be_kept_elsewhere() -> None:
    codec, d = Codec(4), torch.randn(5, 64)
    encoded, decoded = codec.encode(d)
    assert encoded.to("meta").codes.device.type == encoded.to("meta").scales.device.type == "meta"
    parked = encoded.replace(encoded.codes.clone(), encoded.scales.clone())
    assert isinstance(parked, Encoded) and torch.equal(codec.decode(parked.to("cpu", non_blocking=True)), decoded)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_compiled_it_gives_the_same_bits(bits: int) -> None:
    torch._dynamo.reset()  # the limit of recompilations is per function, over all cases of this test
    codec = Codec(bits)

    @torch.compile(fullgraph=True, dynamic=False)
    def round_trip(d: Tensor) -> tuple[Encoded, Tensor, Tensor, Tensor, Tensor]:
        encoded, decoded = codec.encode(d)
        return encoded, decoded, codec.decode(encoded), *codec.cell(encoded)

    for d in (torch.randn(8, 256), torch.randn(8, 256) * 1e-30, torch.zeros(8, 256), torch.randn(7, 33)):
        d[:4, :3] *= 100  # outliers in some groups
        compiled, *results = round_trip(d)
        encoded, decoded = codec.encode(d)
        assert torch.equal(compiled.codes, encoded.codes)
        assert torch.equal(compiled.scales, encoded.scales)
        for found, expected in zip(results, (decoded, codec.decode(encoded), *codec.cell(encoded)), strict=True):
            assert torch.equal(found, expected)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bits", [0, 5, 7, 16, -1, 2.5, "4"])
def test_other_widths_are_refused_by_name(bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits=.*one of \(1, 2, 3, 4, 6, 8\)"):
        Codec(bits)


@pytest.mark.parametrize("group", [0, 8, 20, 1032, 2048, 64.0, -64])
def test_other_groups_are_refused_with_what_is_possible(group: object) -> None:
    with pytest.raises(ValueError, match=r"group=.*multiple of 8 .* from 16 to 1024"):
        Codec(4, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"encode was given {dtype}.*float32 or float64"):
        Codec(4).encode(torch.zeros(64, dtype=dtype))
