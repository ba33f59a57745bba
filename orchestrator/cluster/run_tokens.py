"""The token that members of one run ask of each other, made from the token of the cluster that they are in.

HKDF with SHA-256 (RFC 5869, sections 2.2 and 2.3; one block of output is all that is needed): the cluster's token is
the key, the run's name says what for, and the salt, which is no secret, is new at each start of the run. Whoever has
the cluster's token and the salt can make it; from it nobody gets the cluster's token, or that of another run.
"""

from __future__ import annotations

import hashlib
import hmac

PURPOSE = b"atoll run token\0"


def run_token(cluster_token: str, run_id: str, salt: str) -> str:
    """64 hexadecimal digits, which tell nothing of `cluster_token`."""
    return hkdf(cluster_token.encode(), salt=salt.encode(), info=PURPOSE + run_id.encode()).hex()


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """The first 32 bytes of HKDF-SHA256."""
    key = hmac.digest(salt, secret, hashlib.sha256)
    return hmac.digest(key, info + b"\x01", hashlib.sha256)
