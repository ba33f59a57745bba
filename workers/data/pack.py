"""Text to tokens, once: `pack` streams files into a folder of Arrow shards with an index (see `index.py` for its
layout).

The split: each block of text (see `sources.py`) is hashed with BLAKE3; the first 64 bits as a number, below
`val_fraction` of 2**64, make it validation text. So equal blocks are on the same side, whatever their file, and
adding files moves no block. Neighbouring blocks of one document that are on the same side stay joined; every such run
ends with the separator.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from workers.data.errors import DataError
from workers.data.index import (
    INDEX_FILE,
    MAX_SEQ_LEN,
    MIN_SEQ_LEN,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    PackIndex,
    Scope,
    SplitName,
    count_samples,
    load_index,
    pack_digest,
    shard_paths,
)
from workers.data.shards import ShardWriter
from workers.data.sources import Block, SourceFile, find_sources, read_blocks
from workers.data.tokenizers import JsonTokenizer, Piece, Tokenizer, build_tokenizer, token_type

_LOOKED_AT, _LETTERS = 64, 4096  # pieces of a text, letters of each
_UNKNOWN_NOTED, _UNKNOWN_REFUSED = 0.001, 0.5
_BATCH_BYTES = 1 << 20


def pack(
    sources: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "bytes",
    text_field: str | None = None,
    text_column: str | None = None,
    seq_len: int = 128,
    val_fraction: float = 0.05,
    scope: Scope = "run",
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PackIndex:
    """Tokenize `sources` (files and folders) into the pack `out` and return its index.

    `scope`: "island" makes a pack that never leaves its machine (`PackIndex`).
    `tokenizer` is "bytes" or the path of a tokenizer.json; `text_field` and `text_column` name the text of .jsonl and
    .parquet. `on_progress(done_bytes, total_bytes)` is called about once per MiB, `on_note` with what the user should
    know. The folder appears whole or not at all; an existing pack is replaced, anything else is refused. Raises
    `DataError` for every mistake in the arguments or the text.
    """
    _check_settings(seq_len, val_fraction)
    target = Path(out).resolve()
    _check_target(target)
    files = find_sources(sources, text_field=text_field, text_column=text_column)
    built = build_tokenizer(tokenizer)
    with _new_folder(target) as folder:
        packer = _Packer(folder, built, val_fraction)
        try:
            packer.read(files, on_progress or (lambda done, total: None))
            _check_unknown(packer.unknown_shares, tokenizer, on_note)
            index = packer.finish(seq_len, scope, sum(file.num_bytes for file in files))
        finally:
            packer.abandon()
        _install(folder, target)
    return index


def _check_unknown(shares: Sequence[float], tokenizer: str, on_note: Callable[[str], None] | None) -> None:
    share = sum(shares) / max(len(shares), 1)
    told = f"the tokenizer {tokenizer!r} does not know {100 * share:.1f} % of the letters it was tried on"
    if share > _UNKNOWN_REFUSED:
        raise DataError(f"{told}: it is of another language or alphabet; give one that was trained on such text")
    if share > _UNKNOWN_NOTED and on_note is not None:
        on_note(f"{told}; they are not in the pack, or as its unknown token")


class _Packer:
    """Sends blocks to the train or the val writer, in batches that are tokenized at once."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, val_fraction: float) -> None:
        self._folder, self._tokenizer, self._val_fraction = folder, tokenizer, val_fraction
        self._val_below = int(val_fraction * 2**64)
        self._dtype = token_type(tokenizer.vocab_size)
        self._writers = {name: ShardWriter(folder, name, self._dtype) for name in SPLITS}
        self._pieces: dict[SplitName, list[Piece]] = {name: [] for name in SPLITS}
        self._num_pending_bytes = 0
        self._num_tokens = dict.fromkeys(SPLITS, 0)
        self._num_blocks = dict.fromkeys(SPLITS, 0)
        self._num_documents = 0
        self.unknown_shares: list[float] = []
        self._open: SplitName | None = None

    def read(self, files: Sequence[SourceFile], on_progress: Callable[[int, int], None]) -> None:
        total = sum(file.num_bytes for file in files)
        before = 0
        for file in files:
            for block in read_blocks(file):
                self._add(block)
                if self._num_pending_bytes >= _BATCH_BYTES:
                    self._flush()
                    on_progress(before + block.num_read_bytes, total)
            before += file.num_bytes
        self._end_run()
        self._flush()
        on_progress(total, total)

    def finish(self, seq_len: int, scope: Scope, num_source_bytes: int) -> PackIndex:
        """Close the shards, check that both parts have samples, write the tokenizer and, last, the index."""
        for name in SPLITS:
            if count_samples(self._num_tokens[name], seq_len) == 0:
                raise self._too_small(name, seq_len)
        tokenizer = self._tokenizer
        splits = {}
        for name in SPLITS:
            splits[name] = {
                "num_tokens": self._num_tokens[name],
                "num_samples": count_samples(self._num_tokens[name], seq_len),
                "num_blocks": self._num_blocks[name],
                "shards": [shard.model_dump() for shard in self._writers[name].close()],
            }
        content = {
            "schema_version": SCHEMA_VERSION,
            "tokenizer": {
                "kind": tokenizer.kind,
                "digest": tokenizer.digest,
                "separator_id": tokenizer.separator_id,
            },
            "vocab_size": tokenizer.vocab_size,
            "token_type": self._dtype,
            "seq_len": seq_len,
            "val_fraction": self._val_fraction,
            "num_documents": self._num_documents,
            "num_source_bytes": num_source_bytes,
            "splits": splits,
        }
        index = PackIndex.model_validate(content | {"digest": pack_digest(content), "scope": scope}, strict=False)
        if tokenizer.kind == "json":
            _write(self._folder / TOKENIZER_FILE, tokenizer.to_json())
        _write(self._folder / INDEX_FILE, index.model_dump_json(indent=2, exclude_defaults=True) + "\n")
        return index

    def abandon(self) -> None:
        for writer in self._writers.values():
            writer.abandon()

    def _add(self, block: Block) -> None:
        hashed = int.from_bytes(blake3(block.data).digest(length=8), "little")
        name: SplitName = "val" if hashed < self._val_below else "train"
        if block.starts_document or name != self._open:
            self._end_run()
        self._num_documents += block.starts_document
        self._num_blocks[name] += 1
        self._num_pending_bytes += len(block.data)
        self._pieces[name].append(block.data)
        self._open = name

    def _end_run(self) -> None:
        if self._open is not None:
            self._pieces[self._open].append(None)
            self._open = None

    def _flush(self) -> None:
        for name, pieces in self._pieces.items():
            if pieces:
                self._look_for_unknown(pieces)
                tokens = self._tokenizer.encode_pieces(pieces)
                self._num_tokens[name] += len(tokens)
                self._writers[name].append(tokens)
                pieces.clear()
        self._num_pending_bytes = 0

    def _look_for_unknown(self, pieces: Sequence[Piece]) -> None:
        """Some tokenizers drop what they do not know, without a word: look at the first pieces of the text."""
        if not isinstance(self._tokenizer, JsonTokenizer):
            return
        for piece in pieces:
            if piece is not None and len(self.unknown_shares) < _LOOKED_AT:
                self.unknown_shares.append(self._tokenizer.unknown_share(piece.decode()[:_LETTERS]))

    def _too_small(self, name: SplitName, seq_len: int) -> DataError:
        num_tokens, num_blocks = self._num_tokens[name], sum(self._num_blocks.values())
        if num_blocks == 0:
            return DataError("the sources hold no text; give files that are not empty")
        remedy = "give more text, or a smaller seq_len"
        if self._num_blocks[name] == 0:
            change = "larger" if name == "val" else "smaller"
            remedy = f"give more text, or a {change} val_fraction"
        return DataError(
            f"the {name} part would have no sample: {self._num_blocks[name]} of {num_blocks} blocks of text fell to it "
            f"(val_fraction {self._val_fraction}), {num_tokens} tokens, and one sample needs {seq_len + 1}; {remedy}"
        )


# ---------------------------------------------------------------- the folder


def _check_settings(seq_len: int, val_fraction: float) -> None:
    if not MIN_SEQ_LEN <= seq_len <= MAX_SEQ_LEN:
        raise DataError(f"seq_len {seq_len} is not between {MIN_SEQ_LEN} and {MAX_SEQ_LEN}")
    if not (math.isfinite(val_fraction) and 0 < val_fraction < 1):
        raise DataError(f"val_fraction {val_fraction} is not between 0 and 1; a run needs text of both parts")


def _check_target(target: Path) -> None:
    """Refuse an output that is neither free, nor an empty folder, nor a pack and nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target}: a file is there; choose another folder")
    try:
        present = set(os.listdir(target))
    except OSError as error:
        raise DataError(f"--out {target}: cannot be read ({error.strerror}); choose another folder") from None
    if not present:
        return
    try:
        index = load_index(target)
    except DataError as error:
        raise DataError(
            f"--out {target}: not empty and not a pack; choose another folder, or remove it ({error})"
        ) from None
    foreign = present - {INDEX_FILE, TOKENIZER_FILE} - {file.name for _, _, file in shard_paths(target, index)}
    if foreign:
        raise DataError(
            f"--out {target}: beside a pack it holds {min(foreign)!r}, which would be lost; move it away, or choose "
            "another folder"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside the target, so that one rename installs it; remove it if it is still there."""
    folder = _sibling(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise DataError(
            f"--out {target}: cannot be made ({error.strerror}); choose a folder you may write to"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(folder: Path, target: Path) -> None:
    _check_target(target)
    try:
        if (target / INDEX_FILE).exists():
            old = _sibling(target, "old")
            os.rename(target, old)
            try:
                os.rename(folder, target)
            except OSError:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(folder, target)
    except OSError as error:
        raise DataError(f"--out {target}: cannot be put in place ({error.strerror}); choose another folder") from None


def _sibling(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _write(path: Path, text: str) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from None
