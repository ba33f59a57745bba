"""The canonical JSON of rosters, which hashes are taken of: thousands of contributions, several times an exchange."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii
from math import isfinite

from workers.identities import RosterEntry


def entry_text(entry: RosterEntry) -> str:
    """Its canonical JSON, keys in order and no spaces, in a third of the time that `json` takes."""
    member, incarnation, seq, since, upto, ranges, num_steps, coefficient = entry
    plain = type(coefficient) is float and isfinite(coefficient)
    share = float.__repr__(coefficient) if plain else json.dumps(coefficient, allow_nan=False)
    spans = ",".join([f"[{start},{stop}]" for start, stop in ranges])
    return (
        f'{{"coefficient":{share},"incarnation":{incarnation},"member":{encode_basestring_ascii(member)},'
        f'"num_steps":{num_steps},"ranges":[{spans}],"seq":{seq},"since":{since},"upto":{upto}}}'
    )


class RosterTexts:
    """The text of the roster that was encoded last: one and the same is named, agreed on and sealed in a row."""

    def __init__(self) -> None:
        self._last: tuple[tuple[RosterEntry, ...], str] = ((), "[]")

    def text(self, roster: tuple[RosterEntry, ...]) -> str:
        """Its canonical JSON."""
        known, text = self._last
        if known is not roster:
            text = f"[{','.join(map(entry_text, roster))}]"
            self._last = (roster, text)
        return text
