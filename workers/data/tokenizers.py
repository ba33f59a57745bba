"""Tokenizers of a pack: bytes, or a `tokenizer.json` through the `tokenizers` library.

Bytes: a token is a byte of the UTF-8 text, so the vocabulary has 256 entries. The byte 0xFF occurs in no UTF-8 text
and ends a document; no 257th token is needed, and tokens are stored in one byte each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from workers.data.errors import DataError
from workers.data.index import TOKENIZER_FILE, PackIndex, TokenType

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Library

Tokens: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]
Piece: TypeAlias = bytes | None
"""UTF-8 text, or None: the separator."""

BYTES = "bytes"
SEPARATOR_BYTE = 0xFF
SEPARATOR = "<|endoftext|>"
# The end-of-text tokens of the usual families, in the order in which they are looked for.
_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of Atoll may ask of a tokenizer."""

    @property
    def kind(self) -> Literal["bytes", "json"]:
        """Where it came from."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def separator_id(self) -> int:
        """The token that ends every document."""

    @property
    def digest(self) -> str:
        """BLAKE3 of `to_json()`, 32 hex characters."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens written in it are plain text, none are added."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without separators; bytes that are no UTF-8 become U+FFFD."""

    def to_json(self) -> str:
        """Return it as the text of a Hugging Face `tokenizer.json`."""

    def encode_pieces(self, pieces: Sequence[Piece]) -> Tokens:
        """Return one stream of tokens for UTF-8 pieces and separators (None)."""


class ByteTokenizer:
    """UTF-8 bytes; 0xFF ends a document."""

    kind: Literal["bytes"] = "bytes"
    vocab_size = 256
    separator_id = SEPARATOR_BYTE

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of `to_json()`."""
        return _digest(self.to_json())

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text; raises `DataError` for a lone surrogate, which UTF-8 cannot hold."""
        return list(_utf8(text))

    def decode(self, ids: list[int]) -> str:
        """Return the text of byte tokens, without separators; what is no UTF-8 becomes U+FFFD."""
        _check_ids(ids, self.vocab_size)
        return bytes(token for token in ids if token != SEPARATOR_BYTE).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return a byte-level BPE without merges: the same ids, but for text that spells the separator."""
        return json.dumps(_byte_level_document(), ensure_ascii=False, indent=2)

    def encode_pieces(self, pieces: Sequence[Piece]) -> NDArray[np.uint8]:
        """Return the bytes of the pieces, 0xFF for None."""
        separator = bytes([SEPARATOR_BYTE])
        return np.frombuffer(b"".join([separator if piece is None else piece for piece in pieces]), dtype=np.uint8)


class JsonTokenizer:
    """A `tokenizer.json`. Where it has no end of text, `<|endoftext|>` is added as its last token (see `to_json`)."""

    kind: Literal["json"] = "json"

    def __init__(self, text: str, *, place: str) -> None:
        self._place = place
        self._library, self._text, self.separator_id = _load_library(text, place)
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())
        self._dtype = np.dtype(token_type(self.vocab_size))

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of `to_json()`."""
        return _digest(self._text)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens written in it are plain text, none are added."""
        _utf8(text)
        with _LibraryErrors(f"{self._place}: cannot tokenize"):
            return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without separators and other special ones."""
        _check_ids(ids, self.vocab_size)
        return str(self._library.decode([each for each in ids if each != self.separator_id], skip_special_tokens=True))

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json`."""
        return self._text

    def unknown_share(self, text: str) -> float:
        """Share of a text's characters, white space left out, that no token stands for, or only the unknown one."""
        wanted = {place for place, letter in enumerate(text) if not letter.isspace()}
        unknown = getattr(self._library.model, "unk_token", None)
        with _LibraryErrors(f"{self._place}: cannot tokenize"):
            encoding = self._library.encode(text, add_special_tokens=False)
        known: set[int] = set()
        for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
            if token != unknown:
                known.update(range(start, stop))
        return len(wanted - known) / max(len(wanted), 1)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Tokens:
        """Return the tokens of the pieces, each tokenized alone, and the separator for None."""
        texts = [piece.decode() for piece in pieces if piece is not None]
        with _LibraryErrors(f"{self._place}: cannot tokenize"):
            encodings = iter(self._library.encode_batch_fast(texts, add_special_tokens=False))
        separator = [self.separator_id]
        parts = [np.array(separator if piece is None else next(encodings).ids, dtype=self._dtype) for piece in pieces]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self._dtype)


def build_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name`: "bytes", or the path of a `tokenizer.json` (or of the folder that holds
    one)."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"tokenizer {name!r}: no such file; give 'bytes' or the path of a {TOKENIZER_FILE}")
    return JsonTokenizer(_read_text(path), place=str(path))


def load_tokenizer(path: Path, index: PackIndex) -> Tokenizer:
    """Return the tokenizer of the pack in folder `path`; raises `DataError` where another made the tokens."""
    file = path / TOKENIZER_FILE
    tokenizer: Tokenizer = ByteTokenizer()
    if index.tokenizer.kind == "json":
        if not file.is_file():
            raise DataError(f"{file}: the pack's tokenizer is missing; copy the pack again from where it came")
        tokenizer = JsonTokenizer(_read_text(file), place=str(file))
    if tokenizer.digest != index.tokenizer.digest:
        raise DataError(
            f"{file if index.tokenizer.kind == 'json' else path}: has digest {tokenizer.digest}, its tokens "
            f"were made with {index.tokenizer.digest}; restore the pack's own {TOKENIZER_FILE}, or make the pack again"
        )
    return tokenizer


def token_type(vocab_size: int) -> TokenType:
    """Return the smallest unsigned type that holds every token of the vocabulary."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


class _LibraryErrors:
    """Turn the library's errors into `DataError`: it raises bare `Exception`, which no narrower clause catches."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is Exception:
            raise DataError(
                f"{self._place}: {error}; check that the file loads with the `tokenizers` library"
            ) from error


def _load_library(text: str, place: str) -> tuple[_Library, str, int]:
    """Return the library's tokenizer, its text and its separator."""
    from tokenizers import Tokenizer as Library

    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); give a {TOKENIZER_FILE} of the `tokenizers` library") from None
    if not isinstance(document, dict) or "model" not in document:
        raise DataError(f"{place}: has no 'model'; give a {TOKENIZER_FILE} of the `tokenizers` library")
    with _LibraryErrors(f"{place}: not a usable tokenizer"):
        library = Library.from_str(text)
    if not library.get_vocab(with_added_tokens=True):
        raise DataError(f"{place}: its vocabulary is empty; give a trained tokenizer")
    found = (library.token_to_id(name) for name in _SEPARATORS)
    separator_id = next((token for token in found if token is not None), None)
    if separator_id is None:
        library.add_special_tokens([SEPARATOR])
        separator_id = library.token_to_id(SEPARATOR)
        text = library.to_str()
    assert separator_id is not None
    # A file may say "cut at 512 tokens" or "pad"; and a text that spells a special token must not become one.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library, text, separator_id


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; give a {TOKENIZER_FILE} of the `tokenizers` library") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text holds a lone surrogate at character {error.start}; remove it") from None


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        raise DataError(f"token {min(ids)} or {max(ids)} is outside the vocabulary 0..{vocab_size - 1}")


def _digest(text: str) -> str:
    return blake3(text.encode("utf-8")).hexdigest(length=16)


def _byte_level_document() -> dict[str, Any]:
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols()) if byte != SEPARATOR_BYTE}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    separator = {
        "id": SEPARATOR_BYTE,
        "content": SEPARATOR,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab | {SEPARATOR: SEPARATOR_BYTE},
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [separator],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def _byte_symbols() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
