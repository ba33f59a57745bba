"""Tokenizers: bytes, and tokenizer.json files that are hostile in the ways real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.errors import DataError
from workers.data.tokenizers import SEPARATOR, ByteTokenizer, JsonTokenizer, build_tokenizer, token_type

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def bpe(*, special: list[str], vocab_size: int = 400) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog sat on the mat " * 20], trainer)
    return tokenizer


@given(TEXTS)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.separator_id not in ids
    assert tokenizer.decode([*ids, tokenizer.separator_id]) == text


@settings(deadline=None)
@given(TEXTS)
def test_bytes_as_json_gives_the_same_ids(text: str) -> None:
    library = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    assert library.get_vocab_size() == 256 and library.token_to_id(SEPARATOR) == 255
    if SEPARATOR not in text:
        ids = ByteTokenizer().encode(text)
        assert library.encode(text).ids == ids
        assert library.decode([*ids, 255]) == text


def test_bytes_decode_shows_broken_text_and_refuses_foreign_tokens() -> None:
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\ufffd"
    with pytest.raises(DataError, match=r"outside the vocabulary 0\.\.255"):
        ByteTokenizer().decode([256])
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        ByteTokenizer().encode("a\ud800")


def test_bytes_digest_never_changes() -> None:
    assert ByteTokenizer().digest == "274840345ee0bf6949d3af33e4c67f36"


def test_json_keeps_the_file_where_it_names_an_end(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    bpe(special=["<pad>", "</s>"]).save(str(file))
    tokenizer = build_tokenizer(str(file))
    assert tokenizer.kind == "json" and tokenizer.separator_id == 1
    assert tokenizer.to_json() == file.read_text()
    assert build_tokenizer(str(tmp_path)).digest == tokenizer.digest
    ids = tokenizer.encode("the cat é")
    assert tokenizer.decode([*ids, 1]) == "the cat é"
    pieces = tokenizer.encode_pieces([b"the cat", None, b"the dog", None])
    assert pieces.dtype == np.uint16
    assert pieces.tolist() == [*tokenizer.encode("the cat"), 1, *tokenizer.encode("the dog"), 1]
    assert tokenizer.encode_pieces([]).tolist() == []


def test_json_without_an_end_gets_one_as_its_last_token() -> None:
    tokenizer = JsonTokenizer(bpe(special=[]).to_str(), place="here")
    assert tokenizer.separator_id == tokenizer.vocab_size - 1
    again = JsonTokenizer(tokenizer.to_json(), place="there")
    assert (again.separator_id, again.vocab_size, again.digest) == (
        tokenizer.separator_id,
        tokenizer.vocab_size,
        tokenizer.digest,
    )


def test_json_settings_of_the_file_do_not_change_the_tokens() -> None:
    plain = bpe(special=["</s>"])
    wanted = plain.encode("the cat and the dog " * 9).ids
    plain.enable_truncation(4)
    plain.enable_padding(length=512)
    plain.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer = JsonTokenizer(plain.to_str(), place="here")
    assert tokenizer.encode("the cat and the dog " * 9) == wanted
    assert tokenizer.encode_pieces([b"the cat and the dog " * 9]).tolist() == wanted


def test_text_that_spells_the_separator_does_not_become_one() -> None:
    tokenizer = JsonTokenizer(bpe(special=["</s>"]).to_str(), place="here")
    assert tokenizer.separator_id not in tokenizer.encode("a </s> b")
    assert tokenizer.separator_id not in tokenizer.encode_pieces([b"a </s> b"])


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "no 'model'"),
        (b'{"a": 1}', "no 'model'"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": {"type": "Nonsense"}}', "not a usable tokenizer"),
        (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "empty"),
    ],
)
def test_unusable_file_is_one_clear_error(tmp_path: Path, content: bytes, cause: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        build_tokenizer(str(file))
    assert str(file) in str(caught.value)


def test_missing_file_and_unknown_words() -> None:
    with pytest.raises(DataError, match="'bytes' or the path"):
        build_tokenizer("byte")
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "?"}}
    tokenizer = JsonTokenizer(json.dumps(words), place="words.json")
    with pytest.raises(DataError, match=r"words\.json: cannot tokenize"):
        tokenizer.encode("unknown")
    with pytest.raises(DataError, match=r"words\.json: cannot tokenize"):
        tokenizer.encode_pieces([b"unknown"])


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_smallest_type(size: int, dtype: str) -> None:
    assert token_type(size) == dtype
