from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.data.tokenizers import ByteTokenizer
from workers.model.errors import ModelError
from workers.model.factory import build_model
from workers.model.sample import generate

TOKENIZER = ByteTokenizer()


class Counter(nn.Module):
    """Says that the next token is the last one plus one, and notes how much it saw."""

    def __init__(self, seq_len: int | None = 4) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.widths: list[int] = []
        if seq_len is not None:
            self.seq_len = seq_len

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.widths.append(tokens_BT.shape[1])
        return 50.0 * nn.functional.one_hot((tokens_BT + 1) % 256, 256).float()


def test_greedy_and_cold_sampling_follow_the_model_and_crop_to_its_context() -> None:
    for temperature in (0.0, 1e-6, 0.5):
        model = Counter()
        assert generate(model, TOKENIZER, "ab", 5, temperature, 0) == "abcdefg"
        assert model.widths == [2, 3, 4, 4, 4]
        assert model.training


def test_a_separator_ends_the_text_and_an_empty_prompt_starts_a_document() -> None:
    assert generate(Counter(), TOKENIZER, "\ufffd", 0, 0.0, 0) == "\ufffd"
    near_the_end = generate(Counter(), _Raw(), "\xfd", 9, 0.0, 0)
    assert near_the_end == "fdfe"
    assert generate(Counter(), _Raw(), "", 2, 0.0, 0) == "ff0001"


class _Raw:
    """Latin-1 characters in, hexadecimal out."""

    separator_id = 255

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).hex()


def test_a_seed_decides_the_text() -> None:
    model = build_model(ModelConfig(dim=32, heads=2), vocab_size=256, seq_len=16, seed=0).model
    before = torch.get_rng_state()
    texts = [generate(model, TOKENIZER, "x", 30, 1.0, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_requests() -> None:
    with pytest.raises(ModelError, match="temperature = -1"):
        generate(Counter(), TOKENIZER, "x", 3, -1.0, 0)
    with pytest.raises(ModelError, match="has no seq_len"):
        generate(Counter(seq_len=None), TOKENIZER, "x", 3, 1.0, 0)
    assert generate(Counter(seq_len=None), TOKENIZER, "a", 1, 0.0, 0, context=8) == "ab"
