"""Names to codecs and strategies. A new one is a file of its own and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from strategies.aggregate import decode_accumulate
from strategies.async_dn import build_async_dn
from strategies.codecs.backends import Backend, resolve_backend
from strategies.codecs.base import Codec, PayloadError, read_header
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.fp4 import Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Bf16, Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.topk import TopK
from strategies.config import CodecConfig, StrategyConfig
from strategies.ddp import InnerSettings, build_ddp
from strategies.decoupled import build_decoupled
from strategies.delayed import build_delayed
from strategies.diloco import build_diloco
from strategies.eager import build_eager
from strategies.errors import SettingError
from strategies.in_pairs import build_in_pairs
from strategies.muloco import build_muloco
from strategies.norm import sum_of_squares
from strategies.outer import Nesterov
from strategies.sparseloco import build_sparseloco
from strategies.strategy import Strategy
from strategies.streaming import build_streaming

# Name -> (block, backend, key) -> codec.
CODECS: Mapping[str, Callable[[int, Backend, int], Codec]] = {
    "fp32": lambda block, backend, key: Fp32(_of_cpu(backend)),
    "bf16": lambda block, backend, key: Bf16(_of_cpu(backend)),
    "int8": lambda block, backend, key: Int8(block, backend),
    "int8-stochastic": lambda block, backend, key: Int8Stochastic(block, backend, key),
    "int4": lambda block, backend, key: Int4(block, backend),
    "int4-stochastic": lambda block, backend, key: Int4Stochastic(block, backend, key),
    "fp4": lambda block, backend, key: Fp4(block, backend),
    "e3m0": lambda block, backend, key: E3m0(block, backend),
    "sign": lambda block, backend, key: Sign(block, backend),
    "topk": lambda block, backend, key: TopK(block, backend),
}

T = TypeVar("T")

# From the id in a payload's header to the codec that reads it.
DECODERS: Mapping[int, Callable[[int, Backend], Codec]] = {
    Fp32.codec_id: lambda block, backend: Fp32(_of_cpu(backend)),
    Bf16.codec_id: lambda block, backend: Bf16(_of_cpu(backend)),
    **{kind.codec_id: kind for kind in (Int8, Int4, Fp4, E3m0, Sign, TopK)},
}

Rounds = Callable[[float], int]
LrAt = Callable[[float], float]
Builder = Callable[[StrategyConfig, CodecConfig, Codec, Rounds, LrAt, InnerSettings], Strategy]

# Name -> (strategy, codec settings, codec, local steps of a round, inner learning rate, `[train]`) -> strategy.
STRATEGIES: Mapping[str, Builder] = {
    "diloco": lambda config, codecs, codec, rounds, lr_at, train: build_diloco(config, codecs, codec, rounds),
    "streaming": lambda config, codecs, codec, rounds, lr_at, train: build_streaming(config, codecs, codec, rounds),
    "eager": lambda config, codecs, codec, rounds, lr_at, train: build_eager(config, codecs, codec, rounds),
    "delayed": lambda config, codecs, codec, rounds, lr_at, train: build_delayed(config, codecs, codec, rounds),
    "muloco": lambda config, codecs, codec, rounds, lr_at, train: build_muloco(config, codecs, codec, rounds, train),
    "sparseloco": lambda config, codecs, codec, rounds, lr_at, train: build_sparseloco(config, codecs, codec, rounds),
    "async-dn": lambda config, codecs, codec, rounds, lr_at, train: build_async_dn(config, codecs, codec, rounds),
    "decoupled": lambda config, codecs, codec, rounds, lr_at, train: build_decoupled(config, codecs, codec, rounds),
    "noloco": lambda config, codecs, codec, rounds, lr_at, train: build_in_pairs(config, codecs, codec, rounds),
    "gossip": lambda config, codecs, codec, rounds, lr_at, train: build_in_pairs(config, codecs, codec, rounds),
    "ddp": lambda config, codecs, codec, rounds, lr_at, train: build_ddp(
        config, codecs, codec, lr_at=lr_at, train=train
    ),
}


def build_codec(config: CodecConfig, *, key: int = 0) -> Codec:
    """Return the codec that `[codec]` names, in the implementation that this machine has.

    `key` distinguishes the random numbers of members (`stochastic.mix` of the run's seed and the member's number).
    Raises ValueError for an unknown name or block, and for a backend that is not installed.
    """
    build = _lookup("codec.name", config.name, CODECS)
    backend, _ = resolve_backend(config.backend)
    return build(config.values_per_block, backend, key)


def build_strategy(
    config: StrategyConfig,
    codec_config: CodecConfig,
    *,
    lr_at: Callable[[float], float],
    train: InnerSettings,
    codec_key: int = 0,
) -> Strategy:
    """Return the strategy that `[strategy]` and `[codec]` describe.

    `lr_at` (progress -> learning rate of the inner optimizer) and `train` (`[train]`) are for strategies that apply
    the optimizer themselves, and for the quadratic synchronisation rule; `codec_key` is the key of `build_codec`.
    Raises ValueError for an unknown name and settings that exclude each other.
    """
    build = _lookup("strategy.name", config.name, STRATEGIES)
    warmup = train.warmup if config.qsr_alpha else 0.0
    codec = build_codec(codec_config, key=codec_key)
    return build(config, codec_config, codec, lambda p: config.inner_steps_at(p, lr_at, warmup), lr_at, train)


def decoder_of(payload: Tensor, *, num_values: int, backend: Backend = "torch") -> Codec:
    """Return the codec that a payload names: a run may mix them (a leaver's last offer is lossless).

    Raises PayloadError for an unknown codec, an impossible block or another number of values.
    """
    header = read_header(payload)
    decoder = DECODERS.get(header.codec_id)
    if decoder is None:
        raise PayloadError(f"payload names codec id {header.codec_id}; known are {sorted(DECODERS)}")
    if header.num_values != num_values:
        raise PayloadError(f"payload holds {header.num_values} values, expected {num_values}")
    if header.block == 0:
        raise PayloadError("payload names a block size of 0")
    try:
        return decoder(header.block, backend)
    except ValueError as error:
        raise PayloadError(f"payload names a block size that its codec has not: {error}") from error


def decode_payload(
    payload: Tensor, *, num_values: int, out: Tensor | None = None, backend: Backend = "torch"
) -> Tensor:
    """Decode a payload of any codec, chosen by its header.

    Raises PayloadError for an unknown codec or a malformed payload.
    """
    codec = decoder_of(payload, num_values=num_values, backend=backend)
    return codec.decode(payload, num_values=num_values, out=out)


def warm_up(codec: Codec, device: torch.device | None = None) -> None:
    """Encode, decode, sum and step once, so that no exchange waits for the compiler: 1 to 4 s with an empty cache.

    On `device` (the CPU). Raises SettingError if a Triton form that runs there writes other bytes than the torch form:
    it has to agree with members that have another one.
    """
    values_N = torch.zeros(codec.block + 1, device=device)
    payload = codec.encode(values_N)
    codec.decode(payload, num_values=values_N.numel())
    sum_of_squares(values_N, backend=codec.backend)
    total = decode_accumulate(codec, payload, 1.0, None, num_values=values_N.numel())
    decode_accumulate(codec, payload, 1.0, total.acc_N, num_values=values_N.numel())
    outer = Nesterov(lr=1.0, momentum=0.5, backend=codec.backend)
    outer.step(values_N, (values_N.clone(),), values_N, scale=None, version=0, progress=0.0)
    if codec.backend == "triton":
        index_N = torch.arange(64 * codec.block + 3, device=values_N.device)
        spread_N = ((index_N * 7919) % 4099 - 2049).to(torch.float32)
        values_N = spread_N.div_((index_N % 97 + 1).to(torch.float32))  # of many sizes, the same every time
        payload, plain = codec.encode(values_N), replace(cast("Any", codec), backend="torch")
        decoded_N = codec.decode(payload, num_values=values_N.numel())
        expected_N = plain.decode(payload, num_values=values_N.numel())
        same = torch.equal(decoded_N.view(torch.int32), expected_N.view(torch.int32))
        if not (same and torch.equal(payload, plain.encode(values_N))):
            raise SettingError(
                f"codec.backend = 'triton': codec {codec.name!r} has other bytes than its torch form on "
                f"{values_N.device}; set codec.backend = 'torch'"
            )


def _of_cpu(backend: Backend) -> Backend:
    """What has nothing to encode has no form for GPUs either."""
    return "torch" if backend == "triton" else backend


def _lookup(key: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise SettingError(f"{key} = {name!r} is not known; known are {', '.join(sorted(known))}")
    return known[name]
