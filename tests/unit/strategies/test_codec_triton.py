"""The Triton form writes and reads the same bytes: interpreted where there is no GPU, on the GPU where there is one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from strategies.codecs.backends import TRITON_CODECS, resolve_backend
from strategies.codecs.base import Codec, NonFiniteError, PayloadError
from strategies.config import DEFAULT_BLOCKS, CodecConfig
from strategies.registry import CODECS, build_codec, warm_up
from tests.unit.strategies.test_codec_backends import bits, hard_values

NO_TRITON = importlib.util.find_spec("triton") is None
CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(NO_TRITON, reason="triton is not installed; it comes with torch for CUDA")
DEVICE = torch.device("cuda" if CUDA else "cpu")
CASES = [(name, block) for name in TRITON_CODECS for block in (DEFAULT_BLOCKS[name], 33)]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Without a GPU Triton's interpreter runs the same kernels; it is chosen when they are read."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        if not NO_TRITON:
            importlib.import_module("strategies.codecs.triton_dense")
        yield


def both(name: str, block: int) -> tuple[Codec, Codec]:
    return CODECS[name](block, "torch", 0), CODECS[name](block, "triton", 0)


@needs_triton
@pytest.mark.parametrize(("name", "block"), CASES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_both_forms_write_and_read_the_same_bytes(name: str, block: int) -> None:
    plain, compiled = both(name, block)
    for kind in range(7):
        for num in (1, block - 1, block, 3 * block + 5):
            values = hard_values(num, kind).to(DEVICE)
            payload = plain.encode(values)
            assert torch.equal(compiled.encode(values), payload)
            found = compiled.decode(payload, num_values=num)
            assert torch.equal(bits(found), bits(plain.decode(payload, num_values=num)))
            parts = [part.clone() for _, part in compiled.decode_parts(payload, num_values=num)]
            assert torch.equal(bits(torch.cat(parts)), bits(found))


@needs_triton
@pytest.mark.parametrize(("name", "block"), CASES)
def test_values_beside_a_border_are_rounded_alike(name: str, block: int) -> None:
    plain, compiled = both(name, block)
    steps = torch.arange(-512, 513, dtype=torch.float32) / 64
    for scale in (1.0, 1 / 3, 7e-20):
        middles = steps * torch.tensor(scale)
        ends = torch.tensor([float("inf"), float("-inf")])
        values = torch.stack([middles, *(torch.nextafter(middles, end) for end in ends)], 1).flatten().to(DEVICE)
        assert torch.equal(compiled.encode(values), plain.encode(values))


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_sent_is_refused_in_the_same_words(bad: float) -> None:
    plain, compiled = both("int8", 33)
    values = torch.ones(100, device=DEVICE)
    values[40] = bad
    errors = []
    for codec in (plain, compiled):
        try:
            errors.append(bytes(codec.encode(values).cpu().numpy()))
        except NonFiniteError as error:
            errors.append(str(error).encode())
    assert errors[0] == errors[1]
    payload = plain.encode(torch.ones(100, device=DEVICE))
    payload[19] = 0x7F  # a scale that no encoder writes
    with pytest.raises(PayloadError):
        compiled.decode(payload, num_values=100)


@needs_triton
def test_a_form_that_has_other_bytes_here_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = build_codec(CodecConfig(name="int4", backend="triton", block=64))
    assert codec.backend == "triton"
    warm_up(codec, DEVICE)
    triton_dense = importlib.import_module("strategies.codecs.triton_dense")
    real = triton_dense.encode_rows

    def wrong(name: str, x: Any, scales: Any, codes: Any, limits: Any) -> None:
        real(name, x, scales, codes, limits)
        codes[0, 0] ^= 1

    monkeypatch.setattr(triton_dense, "encode_rows", wrong)
    with pytest.raises(ValueError, match=r"'triton': codec 'int4' has other bytes .*; set codec\.backend = 'torch'"):
        warm_up(codec, DEVICE)
    warm_up(replace(cast("Any", codec), backend="torch"), DEVICE)


def test_triton_is_never_chosen_by_itself_and_must_be_there_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve_backend("auto")[0] != "triton"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(ValueError, match="'triton', but triton is not installed; it comes with torch"):
        resolve_backend("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else find_spec(name))
    assert resolve_backend("triton") == ("triton", None)
