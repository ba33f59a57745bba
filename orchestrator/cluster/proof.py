"""Both sides of a door prove that they know the token, and neither sends it.

Visitor and door choose a nonce each, and each signs both with HMAC-SHA256 under the token. What is signed begins with
who signs, so that no answer can be sent back as a proof; a nonce of the door's is good for one request, so that no
request can be sent twice.
"""

from __future__ import annotations

import hashlib
import hmac
import re

NONCE_HEADER = "X-Atoll-Nonce"
VISITOR_NONCE_HEADER = "X-Atoll-Visitor-Nonce"
PROOF_HEADER = "X-Atoll-Proof"
NONCE_FORM = re.compile(r"[0-9a-f]{32}")


def door_proof(token: str, visitor_nonce: str, door_nonce: str) -> str:
    """The door knows the token."""
    return _sign(token, "door", visitor_nonce, door_nonce)


def visitor_proof(token: str, visitor_nonce: str, door_nonce: str, request: str) -> str:
    """The visitor knows the token and means this request (path and query)."""
    return _sign(token, "visitor", visitor_nonce, door_nonce, request)


def answer_proof(token: str, visitor_nonce: str, door_nonce: str, body: bytes) -> str:
    """The answer is the door's."""
    return _sign(token, "answer", visitor_nonce, door_nonce, hashlib.sha256(body).hexdigest())


def is_same(given: str, right: str) -> bool:
    """Compare two proofs in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), right.encode())


def _sign(token: str, *parts: str) -> str:
    return hmac.new(token.encode(), "\n".join(("atoll", *parts)).encode(), hashlib.sha256).hexdigest()
