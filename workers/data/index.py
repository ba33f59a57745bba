"""The index of a pack, the folder that `atoll data pack` makes. No torch, no Arrow here: the controller reads it.

    pack/
      index.json          this index, written last
      tokenizer.json      only for a tokenizer that came from a file
      train-00000.arrow   tokens of the training part, Arrow IPC
      val-00000.arrow     tokens of the validation part

A part (split) is one stream of tokens; sample i is `tokens[i * seq_len : i * seq_len + seq_len + 1]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.data.errors import DataError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
SCHEMA_VERSION = 1
MIN_SEQ_LEN, MAX_SEQ_LEN = 2, 1 << 20
_DIGEST_BYTES = 16
_MAX_INDEX_BYTES = 256 << 20

SplitName: TypeAlias = Literal["train", "val"]
Scope: TypeAlias = Literal["run", "island"]
TokenType: TypeAlias = Literal["uint8", "uint16", "uint32"]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
SPLITS: tuple[SplitName, ...] = ("train", "val")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ShardIndex(_Record):
    """One Arrow file of tokens. `digest` is the BLAKE3 hash of its tokens (little endian), without the framing."""

    file: str = Field(pattern=r"^(train|val)-[0-9]{5,}\.arrow$")
    num_tokens: int = Field(ge=1)
    num_bytes: int = Field(ge=1)
    digest: Digest


class SplitIndex(_Record):
    """One part of a pack: its tokens in order, over its shards."""

    num_tokens: int = Field(ge=0)
    num_samples: int = Field(ge=0)
    num_blocks: int = Field(ge=0)
    shards: tuple[ShardIndex, ...]


class TokenizerIndex(_Record):
    """The tokenizer of a pack. `separator_id` ends every document; `digest` is that of its tokenizer.json text."""

    kind: Literal["bytes", "json"]
    digest: Digest
    separator_id: int = Field(ge=0)


class PackIndex(_Record):
    """A pack. `digest` names its content (tokenizer, tokens, sample length): equal content, equal digest, anywhere.

    `scope`: "run" is for all islands of a run; "island" never leaves its machine, and only the island there has it.
    """

    schema_version: Literal[1]
    tokenizer: TokenizerIndex
    vocab_size: int = Field(ge=1, le=1 << 32)
    token_type: TokenType
    seq_len: int = Field(ge=MIN_SEQ_LEN, le=MAX_SEQ_LEN)
    val_fraction: float = Field(gt=0, lt=1)
    num_documents: int = Field(ge=0)
    num_source_bytes: int = Field(ge=0)
    splits: dict[SplitName, SplitIndex]
    digest: Digest
    scope: Scope = "run"

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {sorted(self.splits)}, expected {sorted(SPLITS)}")
        for name, split in self.splits.items():
            if split.num_tokens != sum(shard.num_tokens for shard in split.shards):
                raise ValueError(f"{name}: num_tokens is not the sum over the shards")
            if split.num_samples != count_samples(split.num_tokens, self.seq_len):
                raise ValueError(f"{name}: num_samples does not follow from num_tokens and seq_len")
        if self.digest != pack_digest(self.model_dump(mode="json")):
            raise ValueError("digest does not fit the other entries")
        return self


def count_samples(num_tokens: int, seq_len: int) -> int:
    """Return how many samples a stream of `num_tokens` holds; each needs one token after its last for the target."""
    return max(0, (num_tokens - 1) // seq_len)


def pack_digest(index: Mapping[str, Any]) -> str:
    """Return the digest of the content that an index (as JSON values) describes; files and sources do not enter."""
    content = {name: index[name] for name in ("schema_version", "tokenizer", "vocab_size", "token_type", "seq_len")}
    content["splits"] = {
        name: [[shard["num_tokens"], shard["digest"]] for shard in split["shards"]]
        for name, split in index["splits"].items()
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest(length=_DIGEST_BYTES)


def load_index(path: Path) -> PackIndex:
    """Read and check the index of the pack in folder `path`; raises `DataError` if missing, foreign or changed."""
    path = Path(path)
    text = _read_index_text(path)
    try:
        found = json.loads(text)
        version = found.get("schema_version") if isinstance(found, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path / INDEX_FILE}: not a pack index ({error}); {_AGAIN}") from None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path / INDEX_FILE}: schema_version is {version!r}, this Atoll reads {SCHEMA_VERSION}; {_AGAIN}"
        )
    try:
        return PackIndex.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "index"
        raise DataError(f"{path / INDEX_FILE}: damaged or edited at {place}: {first['msg']}; {_AGAIN}") from None


def check_shared(path: Path | str, index: PackIndex) -> None:
    """Refuse what one island has for itself wherever all islands of a run are meant. Raises `DataError`."""
    if index.scope == "island":
        raise DataError(
            f"{path}: this pack has scope = 'island', it never leaves its machine and is no data of a whole run; name "
            "it in [data.per_island.NAME] of the island that has it, beside data.path or data.corpus for all"
        )


def check_own(path: Path | str, index: PackIndex, shared: PackIndex, key: str) -> None:
    """Whether the pack that `key` names is one island's own, and fits that of all. Raises `DataError`."""
    if index.scope != "island":
        raise DataError(
            f"{key}.path = {str(path)!r}: this pack has scope = 'run', and could be handed to anybody; make it with "
            "`atoll data pack --scope island`"
        )
    for name, mine, theirs in (
        ("samples of so many tokens", index.seq_len, shared.seq_len),
        ("a tokenizer of digest", index.tokenizer.digest, shared.tokenizer.digest),
    ):
        if mine != theirs:
            raise DataError(
                f"{key}.path = {str(path)!r}: it has {name}: {mine}, the data of all islands has {theirs}; make it "
                "with the same --seq-len and --tokenizer"
            )


def shard_paths(path: Path, index: PackIndex) -> Iterator[tuple[SplitName, ShardIndex, Path]]:
    """Yield (split, shard, file) for every shard, in the order of the tokens."""
    for name in SPLITS:
        for shard in index.splits[name].shards:
            yield name, shard, Path(path) / shard.file


def check_sizes(path: Path, index: PackIndex) -> None:
    """Check by size alone that every shard is there and whole; raises `DataError` naming the first that is not."""
    for _, shard, file in shard_paths(path, index):
        try:
            num_bytes = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file}: shard cannot be read ({error.strerror}); {_COPY}") from None
        if num_bytes != shard.num_bytes:
            raise DataError(f"{file}: shard has {num_bytes} bytes, the index says {shard.num_bytes}; {_COPY}")


def damaged(file: Path, cause: str) -> DataError:
    """Return the error for a shard that cannot be trusted."""
    return DataError(f"{file}: shard is damaged: {cause}; {_COPY}")


_AGAIN = "make the pack again with `atoll data pack`"
_COPY = "copy the pack again from where it came, or make it again with `atoll data pack`"


def _read_index_text(path: Path) -> bytes:
    file = path / INDEX_FILE
    try:
        if not path.exists():
            raise DataError(f"{path}: no such folder; make a pack with `atoll data pack SOURCE... --out {path}`")
        if not path.is_dir():
            raise DataError(f"{path}: a file, not a pack; make one with `atoll data pack SOURCE... --out DIR`")
        if not file.is_file():
            raise DataError(
                f"{path}: not a pack (it has no {INDEX_FILE}); make one with `atoll data pack SOURCE... --out DIR`"
            )
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{file}: larger than {_MAX_INDEX_BYTES >> 20} MiB, not a pack index; {_AGAIN}")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
