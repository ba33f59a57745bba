"""Tokens of runs: the published vectors, and whom they keep apart."""

from __future__ import annotations

import pytest

from orchestrator.bundle import without_secrets
from orchestrator.cluster.join_string import check_token
from orchestrator.cluster.run_tokens import hkdf, run_token

TOKEN, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("secret", "salt", "info", "first_32_bytes"),
    [
        (
            "0b" * 22,
            bytes(range(0x0D)).hex(),
            bytes(range(0xF0, 0xFA)).hex(),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
        ),
        (
            bytes(range(0x50)).hex(),
            bytes(range(0x60, 0xB0)).hex(),
            bytes(range(0xB0, 0x100)).hex(),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
        ),
        ("0b" * 22, "", "", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
    ],
    ids=["RFC 5869 A.1", "RFC 5869 A.2", "RFC 5869 A.3"],
)
def test_published_vectors(secret: str, salt: str, info: str, first_32_bytes: str) -> None:
    found = hkdf(bytes.fromhex(secret), salt=bytes.fromhex(salt), info=bytes.fromhex(info))
    assert found.hex() == first_32_bytes


def test_another_cluster_another_run_and_another_start_have_other_tokens() -> None:
    mine = run_token(TOKEN, "run-1", "salt")
    assert mine == run_token(TOKEN, "run-1", "salt")
    others = [run_token(OTHER, "run-1", "salt"), run_token(TOKEN, "run-2", "salt"), run_token(TOKEN, "run-1", "new")]
    assert len({mine, TOKEN, *others}) == 5
    assert len({run_token(TOKEN, "run-1", "2"), run_token(TOKEN, "run-", "12"), run_token(TOKEN, "run-12", "")}) == 3


def test_it_looks_like_a_token_so_that_no_archive_shows_it() -> None:
    token = run_token(TOKEN, "lauf-\u00fc", "salt")
    assert check_token(token, place="here") == token
    assert token.encode() not in without_secrets(f"started with {token}".encode())
