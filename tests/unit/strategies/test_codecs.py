from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.codecs.base import HEADER_BYTES, Codec, NonFiniteError, PayloadError, is_finite, largest_magnitude
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.fp4 import Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Bf16, Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.topk import TopK
from strategies.config import DEFAULT_BLOCKS, CodecConfig
from strategies.fragments import default_chunk_values
from strategies.registry import CODECS, DECODERS, build_codec, decode_payload

PLAIN: list[Codec] = [Fp32(), Bf16(), Int8(), Int8(32), Int8(100), Int8Stochastic(32, key=7)]
LOW_BIT: list[Codec] = [Int4(), Int4(33), Int4Stochastic(64, key=8), Fp4(), Fp4(35), E3m0(), E3m0(32)]
SPARSE: list[Codec] = [Sign(), Sign(32), Sign(35), TopK(), TopK(64), TopK(192)]
ALL = [*PLAIN, *LOW_BIT, *SPARSE]
codecs = st.sampled_from(ALL)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """Short vectors of hypothesis' nastiest floats, repeated and scaled so that some fill several blocks."""
    values = np.array(draw(st.lists(finite, max_size=40)), dtype=np.float32)
    repeats = draw(st.integers(1, 8))
    scales = np.array([2.0 ** draw(st.integers(-60, 0)) for _ in range(repeats)], dtype=np.float32)
    return torch.from_numpy(np.concatenate([values * s for s in scales]).astype(np.float32))


def gaussian(num: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=num, scale=scale).astype(np.float32))


def decode(codec: Codec, payload: Tensor, like: Tensor) -> Tensor:
    return codec.decode(payload, num_values=like.numel())


def test_payload_sizes_are_the_formula() -> None:
    for num in (0, 1, 31, 32, 33, 4095, 4096, 4097, 70_000, 300_001):
        sizes = {
            "fp32": 16 + 4 * num,
            "bf16": 16 + 2 * num,
            "int8": 16 + num + 4 * -(-num // 4096),
            "int4": 16 + -(-num // 2) + 4 * -(-num // 256),
            "fp4": 16 + -(-num // 2) + 4 * -(-num // 256),
            "e3m0": 16 + -(-num // 2) + 4 * -(-num // 256),
            "sign": 16 + -(-num // 8) + 4 * -(-num // 4096),
        }
        for codec in (Fp32(), Bf16(), Int8(), Int4(), Fp4(), E3m0(), Sign()):
            payload = codec.encode(torch.ones(num))
            assert payload.dtype == torch.uint8
            assert payload.numel() == codec.num_bytes(num) == sizes[codec.name]
    for codec in ALL:
        assert all(codec.encode(torch.ones(num)).numel() == codec.num_bytes(num) for num in (0, 1, 63, 65, 4097, 9000))


@pytest.mark.parametrize("numel", [10_000_000, 50_000_001])
def test_large_models_take_the_bits_that_the_formulas_say(numel: int) -> None:
    # A scale of 32 bits a block; top-k: 12 + 2 bits for 64 of 4,096. The framing of each chunk comes beside it.
    bits = {"int8": 8, "int4": 4.125, "fp4": 4.125, "e3m0": 4.125, "sign": 1 + 32 / 4096, "topk": 64 * 14 / 4096}
    for name, formula in bits.items():
        codec = build_codec(CodecConfig(name=name))
        chunk = default_chunk_values(numel, codec.block)
        whole, rest = divmod(numel, chunk)
        num_bytes = whole * codec.num_bytes(chunk) + codec.num_bytes(rest) - 16 * (whole + 1)
        assert 1.0 <= 8 * num_bytes / numel / formula < 1.02


@given(codec=codecs, x=vectors())
@settings(max_examples=150, deadline=None)
def test_decoding_is_odd_idempotent_and_keeps_its_input(codec: Codec, x: Tensor) -> None:
    before = x.clone()
    payload = codec.encode(x)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    y = decode(codec, payload, x)
    assert is_finite(y)
    assert torch.equal(decode(codec, codec.encode(-x), x), -y)
    # Not only equal numbers: the same bytes, down to the sign of a zero.
    assert torch.equal(codec.encode(y)[HEADER_BYTES:], payload[HEADER_BYTES:])
    assert torch.equal(decode(codec, codec.encode(y), y), y)
    assert torch.equal(decode_payload(payload, num_values=x.numel()), y)


@given(x=vectors())
@settings(max_examples=60, deadline=None)
def test_fp32_is_exact_to_the_bit(x: Tensor) -> None:
    assert torch.equal(decode(Fp32(), Fp32().encode(x), x).view(torch.int32), x.view(torch.int32))


@given(x=vectors())
@settings(max_examples=60, deadline=None)
def test_bf16_rounds_to_nearest(x: Tensor) -> None:
    y, x64 = decode(Bf16(), Bf16().encode(x), x).double(), x.double()
    assert bool(((y - x64).abs() <= (x64.abs() * 2.0**-8).clamp(min=2.0**-134)).all())


@given(x=vectors(), block=st.sampled_from([32, 100, 4096]))
@settings(max_examples=100, deadline=None)
def test_int8_error_is_at_most_half_a_scale(x: Tensor, block: int) -> None:
    y = decode(Int8(block), Int8(block).encode(x), x).double()
    for first in range(0, x.numel(), block):
        part = x[first : first + block].double()
        scale = float(part.abs().max()) / 127
        bound = scale / 2 * (1 + 2.0**-15) if scale > 2.0**-125 else 127 * 2.0**-125
        assert float((y[first : first + block] - part).abs().max()) <= bound


def test_int8_decodes_without_rounding_and_uses_all_levels() -> None:
    x = gaussian(50_000, scale=1e-3)
    payload = Int8().encode(x)
    blocks = Int8().num_blocks(x.numel())
    scales = payload[16 : 16 + 4 * blocks].view(torch.float32).double().repeat_interleave(4096)[: x.numel()]
    codes = payload[16 + 4 * blocks :].view(torch.int8).double()
    assert torch.equal(decode(Int8(), payload, x).double(), codes * scales)
    assert codes.min() == -127 or codes.max() == 127
    assert int(codes.abs().max()) == 127


def test_int8_rounds_to_nearest_without_bias() -> None:
    # K1: a codec that truncates has a bias of half a level.
    x = gaussian(100_000)
    scale = x.abs().max().double() / 127
    error = (decode(Int8(1 << 17), Int8(1 << 17).encode(x), x).double() - x.double()) / scale
    assert abs(float(error.mean())) < 0.02
    assert 0.28 < float(error.square().mean().sqrt()) < 0.30  # uniform in +-1/2: sqrt(1/12) = 0.289


def test_int8_equals_a_plain_reference() -> None:
    x = gaussian(3 * 4096 + 17, seed=3)
    y = decode(Int8(), Int8().encode(x), x)
    for first in range(0, x.numel(), 4096):
        part = x[first : first + 4096].double()
        scale = float(part.abs().max()) / 127
        expected = torch.round(part / scale) * scale
        levels_apart = (y[first : first + 4096].double() - expected).abs() / scale
        assert float(levels_apart.max()) < 1.01
        # Values next to the middle between two levels may fall on the other side: our scale is rounded.
        assert int((levels_apart > 0.01).sum()) <= 0.002 * part.numel()


def test_int8_extremes() -> None:
    assert torch.equal(decode(Int8(), Int8().encode(torch.zeros(5000)), torch.zeros(5000)), torch.zeros(5000))
    tiny = torch.tensor([1e-45, -1e-40, 1e-37])
    assert torch.equal(decode(Int8(), Int8().encode(tiny), tiny), torch.zeros(3))
    outlier = torch.full((4096,), 1e-3)
    outlier[7] = 127.0
    assert decode(Int8(), Int8().encode(outlier), outlier)[7] == 127.0
    large = torch.tensor([3.37e38, -1.0])
    assert is_finite(decode(Int8(), Int8().encode(large), large))
    with pytest.raises(NonFiniteError, match="too near the end of fp32"):
        Int8().encode(torch.tensor([3.4e38]))


@given(codec=codecs, bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_codec_hides_a_non_finite_value(codec: Codec, bad: float, data: st.DataObject) -> None:
    x = torch.linspace(-1, 1, data.draw(st.sampled_from([1, 33, 5000])))
    x[data.draw(st.integers(0, x.numel() - 1))] = bad
    with pytest.raises(NonFiniteError, match=codec.name):
        codec.encode(x)


def test_a_nan_with_any_payload_bits_is_seen() -> None:
    for bits in (0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000):
        x = torch.zeros(4096)
        x.view(torch.int32)[11] = bits
        for codec in ALL:
            with pytest.raises(NonFiniteError):
                codec.encode(x)


def test_bf16_refuses_what_it_would_round_to_infinity() -> None:
    with pytest.raises(NonFiniteError, match="bf16"):
        Bf16().encode(torch.tensor([3.4e38]))
    assert is_finite(decode(Bf16(), Bf16().encode(torch.tensor([-3.38e38])), torch.zeros(1)))


def test_largest_magnitude_does_not_lose_nan() -> None:
    assert largest_magnitude(torch.tensor([1.0, -3.0, 2.0])) == 3.0
    assert largest_magnitude(torch.empty(0)) == 0.0
    for place in range(3):
        x = torch.tensor([1.0, -3.0, 2.0])
        x[place] = float("nan")
        assert not is_finite(x)
    assert not is_finite(torch.tensor([float("-inf"), 0.0]))


def test_encode_takes_flat_fp32_only() -> None:
    for bad in (
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, 2),
        torch.zeros(8)[::2],
    ):
        for codec in ALL:
            with pytest.raises(ValueError, match="flat contiguous float32"):
                codec.encode(bad)


@pytest.mark.parametrize("codec", ALL, ids=lambda c: f"{c.name}-{c.block}")
def test_decode_into_out_and_from_any_alignment(codec: Codec) -> None:
    x = gaussian(9001)
    payload = codec.encode(x)
    expected = decode(codec, payload, x)
    out = torch.full((9001,), float("nan"))
    assert codec.decode(payload, num_values=9001, out=out) is out
    assert torch.equal(out, expected)
    for shift in (1, 2, 3):
        buffer = torch.zeros(payload.numel() + shift, dtype=torch.uint8)
        buffer[shift:] = payload
        assert torch.equal(decode(codec, buffer[shift:], x), expected)
        by_numpy = torch.from_numpy(buffer.numpy()[shift:])
        assert torch.equal(decode(codec, by_numpy, x), expected)
    with pytest.raises(ValueError, match="out must be"):
        codec.decode(payload, num_values=9001, out=torch.empty(9000))


def refused(codec: Codec, payload: Tensor, num_values: int) -> None:
    with pytest.raises(PayloadError):
        codec.decode(payload, num_values=num_values)
    with pytest.raises(PayloadError):
        decode_payload(payload, num_values=num_values)


@given(raw=st.binary(max_size=64), num_values=st.integers(0, 64), codec=codecs)
@settings(max_examples=150, deadline=None)
def test_foreign_bytes_are_refused(raw: bytes, num_values: int, codec: Codec) -> None:
    refused(codec, torch.tensor(list(raw), dtype=torch.uint8), num_values)


@given(codec=codecs, data=st.data())
@settings(max_examples=150, deadline=None)
def test_cut_padded_and_damaged_payloads_are_refused(codec: Codec, data: st.DataObject) -> None:
    num = data.draw(st.sampled_from([0, 1, 32, 101, 4097]))
    payload = codec.encode(gaussian(num))
    kind = data.draw(st.sampled_from(["cut", "padded", "header", "count"]))
    if kind == "cut":
        refused(codec, payload[: data.draw(st.integers(0, payload.numel() - 1))], num)
    elif kind == "padded":
        extra = data.draw(st.integers(1, 20))
        refused(codec, torch.cat([payload, torch.zeros(extra, dtype=torch.uint8)]), num)
    elif kind == "count":
        refused(codec, payload, data.draw(st.integers(0, 5000).filter(lambda n: n != num)))
    else:
        place = data.draw(st.integers(0, HEADER_BYTES - 1))
        payload[place] ^= data.draw(st.integers(1, 255))
        with pytest.raises(PayloadError):
            codec.decode(payload, num_values=num)
        try:  # another block size may be a valid payload of another codec object; then only the values differ
            assert decode_payload(payload, num_values=num).shape == (num,)
        except PayloadError:
            pass


BLOCKWISE = [codec for codec in ALL if codec.lossy and codec.block > 1]


@given(codec=st.sampled_from(BLOCKWISE), data=st.data())
@settings(max_examples=150, deadline=None)
def test_bodies_decode_to_finite_values_or_are_refused(codec: Codec, data: st.DataObject) -> None:
    payload = codec.encode(gaussian(100))
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(HEADER_BYTES, payload.numel() - 1))] = data.draw(st.integers(0, 255))
    try:
        y = codec.decode(payload, num_values=100)
    except PayloadError:
        return
    assert y.shape == (100,)
    assert is_finite(y)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("codec", [c for c in BLOCKWISE if c.name != "topk"], ids=lambda c: f"{c.name}-{c.block}")
def test_scales_that_no_encoder_writes_are_refused(codec: Codec, scale: float) -> None:
    payload = codec.encode(gaussian(100))
    payload[HEADER_BYTES : HEADER_BYTES + 4].view(torch.float32)[0] = scale
    refused(codec, payload, 100)


@pytest.mark.parametrize("codec", [Int8(32), Int4(32), Fp4(32)], ids=lambda c: c.name)
def test_scales_that_could_overflow_are_refused(codec: Int8 | Int4 | Fp4) -> None:
    payload = codec.encode(gaussian(100))
    scale = payload[HEADER_BYTES : HEADER_BYTES + 4].view(torch.float32)
    scale[0] = codec.max_scale
    payload[-1] = 0x80  # the largest magnitude that the codes have
    assert is_finite(codec.decode(payload, num_values=100))
    scale[0] = 1.001 * codec.max_scale
    refused(codec, payload, 100)


@pytest.mark.parametrize(
    "codec", [Int4(), Fp4(), E3m0(), Sign(), Int4(33), Sign(35)], ids=lambda c: f"{c.name}{c.block}"
)
def test_bits_behind_the_last_value_are_refused(codec: Codec) -> None:
    payload = codec.encode(gaussian(99))
    payload[-1] |= 0x80
    refused(codec, payload, 99)


def test_payloads_of_another_type_or_codec_are_refused() -> None:
    x = gaussian(100)
    payload = Int8().encode(x)
    with pytest.raises(PayloadError, match="flat contiguous uint8"):
        Int8().decode(payload.to(torch.int16), num_values=100)
    with pytest.raises(PayloadError, match="flat contiguous uint8"):
        Int8().decode(payload.repeat(2).view(2, -1), num_values=100)
    with pytest.raises(PayloadError, match="codec id is 3, expected 1"):
        Fp32().decode(payload, num_values=100)
    with pytest.raises(PayloadError, match="block size is 4096, expected 32"):
        Int8(32).decode(payload, num_values=100)
    payload[3] = 200
    with pytest.raises(PayloadError, match=r"codec id 200; known are \[1, 2, 3, 4, 5, 6, 7, 8\]"):
        decode_payload(payload, num_values=100)


def test_registry_builds_every_codec_of_the_configuration() -> None:
    for name in CODECS:
        codec = build_codec(CodecConfig(name=name, block=128))
        assert codec.name == name
        assert codec.block == CodecConfig(name=name, block=128).values_per_block == (1 if name[-2:] in "32 16" else 128)
        assert codec.codec_id in DECODERS
        assert build_codec(CodecConfig(name=name)).block == DEFAULT_BLOCKS.get(name, 1)
    with pytest.raises(ValueError, match=r"codec\.name = 'zip' is not known; known are bf16, e3m0, fp32, fp4, int4"):
        build_codec(CodecConfig.model_construct(name="zip"))
    with pytest.raises(ValueError, match=r"codec\.block = 0"):
        Int8(0)
    for block in (0, 100, 8192):
        with pytest.raises(ValueError, match=r"codec 'topk' needs a multiple of 64 up to 4096"):
            TopK(block)


def test_the_blocks_of_the_configuration_are_those_of_the_codecs() -> None:
    kinds = (Int8, Int8Stochastic, Int4, Int4Stochastic, Fp4, E3m0, Sign, TopK)
    assert {kind.name: kind().block for kind in kinds} == DEFAULT_BLOCKS
