"""The compiled form writes and reads the same bytes as the torch form; which of the two runs is decided openly."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.codecs.backends import load_kernels, resolve_backend, use_cache_dir
from strategies.codecs.base import HEADER_BYTES, Codec, NonFiniteError, PayloadError
from strategies.codecs.stochastic import mix
from strategies.config import DEFAULT_BLOCKS, CodecConfig
from strategies.registry import CODECS, build_codec, decode_payload, warm_up

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = {"topk": (4096, 64, 192)}
PAIRS = [
    (CODECS[name](block, "torch", mix(5)), CODECS[name](block, "numba", mix(5)))
    for name in DEFAULT_BLOCKS
    for block in BLOCKS.get(name, (DEFAULT_BLOCKS[name], 33))
]
pairs = st.sampled_from(PAIRS)
NAMES = [f"{torch_form.name}-{torch_form.block}" for torch_form, _ in PAIRS]
# Lengths around the borders of blocks, bytes and vector registers.
LENGTHS = (0, 1, 2, 31, 33, 63, 64, 65, 255, 256, 257, 511, 4095, 4097, 12_345)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def hard_values(num: int, seed: int) -> Tensor:
    """Values of one kind each: Gaussian, heavy-tailed, sparse, tied, subnormal, huge, negative zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=num)
    kind = seed % 7
    if kind == 1:
        x = x * np.exp(8 * rng.normal(size=num))
    elif kind == 2:
        x[rng.random(num) < 0.99] = 0
    elif kind == 3:
        x = np.round(4 * x) / 4
    elif kind == 4:
        x = x * 2.0 ** rng.integers(-149, -110, size=num)
    elif kind == 5:
        x = np.clip(x, -4, 4) * 2.0 ** rng.integers(100, 124, size=num)
    elif kind == 6:
        x = np.where(rng.random(num) < 0.5, -0.0, x)
    return torch.from_numpy(x.astype(np.float32))


def same_bytes(torch_form: Codec, compiled: Codec, x: Tensor) -> Tensor:
    payload = torch_form.encode(x)
    assert torch.equal(compiled.encode(x), payload)
    expected = torch_form.decode(payload, num_values=x.numel())
    assert torch.equal(bits(compiled.decode(payload, num_values=x.numel())), bits(expected))
    return payload


@pytest.mark.parametrize(("torch_form", "compiled"), PAIRS, ids=NAMES)
def test_both_forms_write_and_read_the_same_bytes(torch_form: Codec, compiled: Codec) -> None:
    assert (torch_form.backend, compiled.backend) == ("torch", "numba")
    for seed, num in enumerate(LENGTHS):
        for kind in range(7):
            same_bytes(torch_form, compiled, hard_values(num, 7 * seed + kind))


@pytest.mark.parametrize(("torch_form", "compiled"), PAIRS, ids=NAMES)
def test_both_forms_round_values_beside_a_border_alike(torch_form: Codec, compiled: Codec) -> None:
    # Every middle between two levels of every codec, one bit below, on and above it, under awkward scales.
    steps = torch.arange(-1024, 1025, dtype=torch.float32) / 64
    logs = torch.tensor([s * 2.0 ** (-k / 2) for k in range(40) for s in (8.0, -8.0)])
    for scale in (1.0, 1 / 3, 0.1, 7e-20, 1.1754945e-38):
        middles = torch.cat([steps, logs]) * torch.tensor(scale)
        ends = torch.tensor([float("inf"), float("-inf")])
        x = torch.stack([middles, *(torch.nextafter(middles, end) for end in ends)], 1).flatten()
        for start in range(3):
            same_bytes(torch_form, compiled, x[start:].contiguous())


@given(pair=pairs, data=st.binary(min_size=0, max_size=600).map(lambda raw: raw[: len(raw) // 4 * 4]))
@settings(max_examples=150, deadline=None)
def test_both_forms_agree_on_any_bits(pair: tuple[Codec, Codec], data: bytes) -> None:
    x = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.empty(0)
    results = []
    for codec in pair:
        try:
            results.append(bytes(codec.encode(x).numpy()))
        except NonFiniteError as error:
            results.append(str(error).encode())
    assert results[0] == results[1]


@given(pair=pairs, num=st.sampled_from([1, 33, 64, 100, 4097]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_both_forms_refuse_the_same_payloads(pair: tuple[Codec, Codec], num: int, data: st.DataObject) -> None:
    payload = pair[0].encode(hard_values(num, 0))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(HEADER_BYTES, payload.numel() - 1))] = data.draw(st.integers(0, 255))
    results: list[Tensor | str] = []
    for codec in pair:
        try:
            results.append(codec.decode(payload, num_values=num))
        except PayloadError as error:
            results.append(str(error))
    first, second = results
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        assert torch.equal(bits(first), bits(second))
    else:
        assert first == second


@pytest.mark.parametrize(("torch_form", "compiled"), PAIRS, ids=NAMES)
def test_compiled_form_reads_any_alignment_and_writes_where_it_is_told(torch_form: Codec, compiled: Codec) -> None:
    x = hard_values(9001, 0)
    payload, expected = torch_form.encode(x), torch_form.decode(torch_form.encode(x), num_values=9001)
    out = torch.full((9003,), float("nan"))
    for shift in range(4):
        buffer = torch.zeros(payload.numel() + shift, dtype=torch.uint8)
        buffer[shift:] = payload
        assert torch.equal(compiled.decode(buffer[shift:], num_values=9001, out=out[1:9002]), expected)
        assert torch.equal(decode_payload(buffer[shift:], num_values=9001, backend="numba"), expected)
    assert bool(out[[0, -1]].isnan().all())
    shifted = torch.cat([torch.zeros(1), x])[1:]
    assert torch.equal(compiled.encode(shifted), payload)


def test_one_codec_serves_two_threads() -> None:
    for torch_form, compiled in PAIRS:
        chunks = [hard_values(20_000, seed) for seed in range(4)]
        expected = [torch_form.encode(chunk) for chunk in chunks]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                assert all(map(torch.equal, pool.map(compiled.encode, chunks), expected))


def test_warming_up_leaves_nothing_to_compile() -> None:
    for _, compiled in PAIRS:
        warm_up(compiled)
        kernels = [k for k in vars(load_kernels("numba_dense")).values() if hasattr(k, "signatures")]
        known = {kernel: list(kernel.signatures) for kernel in kernels}
        x = hard_values(10_000, 0)
        compiled.decode(compiled.encode(x), num_values=10_000)
        list(compiled.decode_parts(compiled.encode(x), num_values=10_000))
        assert {kernel: list(kernel.signatures) for kernel in kernels} == known


# ------------------------------------------------------------ the choice


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))


def test_auto_takes_the_compiled_form_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto") == ("numba", None)
    assert resolve_backend("torch") == ("torch", None)
    assert build_codec(CodecConfig()).backend == "numba"
    assert build_codec(CodecConfig(backend="torch")).backend == "torch"
    assert build_codec(CodecConfig(name="fp32")).backend == "numba", "for the sums: there is nothing to encode"
    without_numba(monkeypatch)
    backend, warning = resolve_backend("auto")
    assert backend == "torch"
    assert warning is not None and "pip install 'atoll[fast]'" in warning
    assert build_codec(CodecConfig()).backend == "torch"
    assert resolve_backend("torch") == ("torch", None), "what was asked for needs no warning"


def test_what_is_asked_for_by_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    without_numba(monkeypatch)
    with pytest.raises(ValueError, match=r"codec\.backend = 'numba'.*not installed.*pip install 'atoll\[fast\]'"):
        build_codec(CodecConfig(backend="numba"))


def test_a_numba_that_cannot_be_imported_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "strategies.codecs.numba_dense", None)
    with pytest.raises(ValueError, match=r"numba cannot be imported .* or set codec\.backend = 'torch'"):
        build_codec(CodecConfig(backend="auto"))


def test_the_cache_is_kept_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    use_cache_dir("/somewhere")
    assert numba.config.CACHE_DIR == "/somewhere"
    use_cache_dir("/elsewhere")
    assert numba.config.CACHE_DIR == "/somewhere", "a folder chosen by the user stays"
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    without_numba(monkeypatch)
    use_cache_dir("/nowhere")
    assert numba.config.CACHE_DIR == ""


def test_neither_numba_nor_torch_is_imported_to_ask() -> None:
    program = (
        "import sys; from strategies.codecs.backends import resolve_backend; resolve_backend('auto'); "
        "import strategies.config; assert not {'numba', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=30)


def test_kernels_are_compiled_without_the_freedom_to_change_bits() -> None:
    for name in ("numba_dense", "numba_sparse"):
        kernels = [k for k in vars(load_kernels(name)).values() if hasattr(k, "targetoptions")]
        assert len(kernels) > 5
        for kernel in kernels:
            assert not kernel.targetoptions.get("fastmath"), kernel
            assert kernel.targetoptions["nogil"]
            assert kernel.targetoptions["error_model"] == "numpy"
