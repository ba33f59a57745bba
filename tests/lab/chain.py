"""A text whose loss can be known: a chain of letters, each followed by one of three others with fixed odds.

A small model learns it within some hundred steps, and no model gets below `ENTROPY`: so two runs end at the same loss
if nothing went wrong, however their steps were spread over islands.
"""

from __future__ import annotations

import math
import random
import string
from pathlib import Path

from tests.small_run import SEQ_LEN
from workers.data.pack import pack

LETTERS = string.ascii_lowercase[:8]
ODDS = (0.6, 0.3, 0.1)
ENTROPY = -sum(odds * math.log(odds) for odds in ODDS)
NUM_LETTERS = 200_000


def make_chain_pack(folder: Path) -> Path:
    """Pack such a text, the same each time, into `folder/pack`."""
    rng = random.Random(0)
    followers = {letter: rng.sample(LETTERS, len(ODDS)) for letter in LETTERS}
    letter, out = LETTERS[0], []
    for _ in range(NUM_LETTERS):
        [letter] = rng.choices(followers[letter], ODDS)
        out.append(letter)
    text = folder / "chain.txt"
    text.write_text("".join(out), encoding="utf-8")
    pack([text], folder / "pack", seq_len=SEQ_LEN, val_fraction=0.2)
    return folder / "pack"
