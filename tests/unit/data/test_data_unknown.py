"""Tokenizers that do not know the text: what they drop is not dropped without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from workers.data.errors import DataError
from workers.data.pack import pack
from workers.data.tokenizers import JsonTokenizer

KNOWN = "reef lagoon atoll"


def word_level(*words: str) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*words, "[UNK]"))}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def without_unknown() -> Tokenizer:
    """Letters of one alphabet, and no token for any other."""
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}, []))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_shares() -> None:
    known = JsonTokenizer(word_level(*KNOWN.split()).to_str(), place="here")
    assert known.unknown_share(KNOWN) == 0
    assert known.unknown_share("reef wave lagoon") == pytest.approx(4 / 14)
    dropping = JsonTokenizer(without_unknown().to_str(), place="here")
    assert dropping.unknown_share("abc") == 0
    assert dropping.unknown_share("abc \u00e9\u00e8\u00e0") == pytest.approx(0.5)
    assert dropping.unknown_share("  ") == 0


def test_notes_and_refusals(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"{(KNOWN + ' ') * (20 + number)} wave")
    notes: list[str] = []
    tokenizer = str(save(word_level(*KNOWN.split()), tmp_path))
    pack([texts], tmp_path / "pack", tokenizer=tokenizer, seq_len=8, val_fraction=0.3, on_note=notes.append)
    assert len(notes) == 1 and "does not know" in notes[0]
    with pytest.raises(DataError, match=r"does not know 73\.5 % of the letters"):
        pack([texts], tmp_path / "other", tokenizer=str(save(word_level("reef"), tmp_path)), seq_len=8)
    assert not (tmp_path / "other").exists()
