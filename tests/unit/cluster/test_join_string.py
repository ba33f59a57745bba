from __future__ import annotations

import pytest

from orchestrator.cluster.join_string import JoinString, format_address, parse, parse_address
from orchestrator.cluster.tokens import new_token
from orchestrator.errors import UserError

TOKEN = "ab" * 32


@pytest.mark.parametrize("host", ["10.0.0.1", "head.example", "::1", "fd00::12"])
def test_what_is_written_is_read(host: str) -> None:
    place = JoinString(host=host, port=4321, token=new_token())
    assert parse(str(place)) == place


def test_an_ipv6_host_stands_in_brackets() -> None:
    assert str(JoinString(host="fd00::1", port=1, token=TOKEN)) == f"atoll://{TOKEN}@[fd00::1]:1"
    assert parse_address("[fd00::1]:7") == ("fd00::1", 7)
    assert format_address("h", 7) == "h:7"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("10.0.0.1:4321", "does not begin with"),
        (f"http://{TOKEN}@h:1", "does not begin with"),
        ("atoll://h:1", "has no token"),
        ("atoll://abc@h:1", "64 hexadecimal digits, this is something else of 3"),
        (f"atoll://{TOKEN.upper()}@h:1", "64 hexadecimal digits"),
        (f"atoll://{TOKEN}@h", "not of the form HOST:PORT"),
        (f"atoll://{TOKEN}@fd00::1:7", "not of the form HOST:PORT"),
        (f"atoll://{TOKEN}@[h]:7", "not of the form HOST:PORT"),
        (f"atoll://{TOKEN}@h:0", "is no port"),
        (f"atoll://{TOKEN}@h:65536", "is no port"),
        (f"atoll://{TOKEN}@h:x", "is no port"),
        (f"atoll://{TOKEN}@-h:1", "not of the form HOST:PORT"),
        (f"atoll://{TOKEN}@h h:1", "not of the form HOST:PORT"),
    ],
)
def test_errors_name_cause_and_remedy_and_never_the_token(text: str, cause: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert cause in caught.value.message
    assert caught.value.remedy
    assert TOKEN not in str(caught.value)
    assert TOKEN.upper() not in str(caught.value)


def test_the_token_is_not_in_its_repr() -> None:
    assert TOKEN not in repr(JoinString(host="h", port=1, token=TOKEN))
