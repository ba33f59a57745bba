"""Names to codecs and strategies. A new one is a file of its own and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from strategies.codecs.base import Codec, Header, PayloadError, read_header
from strategies.codecs.int8 import Int8
from strategies.codecs.none import Bf16, Fp32
from strategies.config import CodecConfig, StrategyConfig
from strategies.ddp import InnerSettings, build_ddp
from strategies.diloco import build_diloco
from strategies.strategy import Strategy

CODECS: Mapping[str, Callable[[CodecConfig], Codec]] = {
    "fp32": lambda config: Fp32(),
    "bf16": lambda config: Bf16(),
    "int8": lambda config: Int8(config.block),
}

T = TypeVar("T")

# From the id in a payload's header to the codec that reads it.
DECODERS: Mapping[int, Callable[[Header], Codec]] = {
    Fp32.codec_id: lambda header: Fp32(),
    Bf16.codec_id: lambda header: Bf16(),
    Int8.codec_id: lambda header: Int8(header.block),
}

Builder = Callable[[StrategyConfig, CodecConfig, Codec, Callable[[float], float], InnerSettings], Strategy]

STRATEGIES: Mapping[str, Builder] = {
    "diloco": lambda config, codec_config, codec, lr_at, train: build_diloco(config, codec_config, codec),
    "ddp": lambda config, codec_config, codec, lr_at, train: build_ddp(
        config, codec_config, codec, lr_at=lr_at, train=train
    ),
}


def build_codec(config: CodecConfig) -> Codec:
    """Return the codec that `[codec]` names. Raises ValueError for an unknown name."""
    return _lookup("codec.name", config.name, CODECS)(config)


def build_strategy(
    config: StrategyConfig, codec_config: CodecConfig, *, lr_at: Callable[[float], float], train: InnerSettings
) -> Strategy:
    """Return the strategy that `[strategy]` and `[codec]` describe.

    `lr_at` (progress -> learning rate of the inner optimizer) and `train` (`[train]`) are for strategies that apply
    the optimizer themselves. Raises ValueError for an unknown name and settings that exclude each other.
    """
    build = _lookup("strategy.name", config.name, STRATEGIES)
    return build(config, codec_config, build_codec(codec_config), lr_at, train)


def decode_payload(payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
    """Decode a payload of any codec, chosen by its header: a run may mix them (a leaver's last offer is lossless).

    Raises PayloadError for an unknown codec or a malformed payload.
    """
    header = read_header(payload)
    decoder = DECODERS.get(header.codec_id)
    if decoder is None:
        raise PayloadError(f"payload names codec id {header.codec_id}; known are {sorted(DECODERS)}")
    if header.num_values != num_values:
        raise PayloadError(f"payload holds {header.num_values} values, expected {num_values}")
    if header.block == 0:
        raise PayloadError("payload names a block size of 0")
    return decoder(header).decode(payload, num_values=num_values, out=out)


def _lookup(key: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise ValueError(f"{key} = {name!r} is not known; known are {', '.join(sorted(known))}")
    return known[name]
