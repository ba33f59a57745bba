"""What members of a group say to each other: from store to store over the transport, without the controller.

A message is a blob of JSON in the store of who says it, under `said/<round>/<speaker>/<to whom>/<number>`. Whoever it
is for waits at the speaker's for the number that comes next. So nothing is pushed and no call changes a peer's state,
as with everything else that travels between members (ADR 3): a fetch that failed is made again, and messages come
in their order, each once. The transport lets in who has the run's token. Who said something is known from the address
that was asked, and not from what the message says of itself.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from workers.pair import KEPT_OUTCOMES, Abort, Commit, Commitment, Offer, PairId, Peer, Ready
from workers.records import MemberId
from workers.store import BlobStore
from workers.transport.base import Cancelled, Transport, TransportError

log = logging.getLogger("atoll.island")

LISTEN_S = 10.0
"""How long a peer is asked to wait for its next message, before it is asked again."""

MAX_MESSAGE_BYTES = 1 << 20
"""An offer names the commits that it rests on: up to 73 of groups of 8, in three rounds, and 100 bytes a member."""
MAX_WHY_CHARS = 1000
_KINDS: dict[str, type[Ready] | type[Commit]] = {"ready": Ready, "commit": Commit}


class BadPairMessage(ValueError):
    """A message that does not follow this protocol; says what is wrong with it."""


# ---------------------------------------------------------------- messages as bytes


def encode_message(message: Peer) -> bytes:
    """The bytes of a message."""
    fields: dict[str, Any] = {"kind": type(message).__name__.lower(), **_heading(message.pair, message.sender)}
    match message:
        case Offer(since=since, upto=upto, digest=digest, rests_on=before):
            fields |= {"since": since, "upto": upto, "digest": digest, "rests_on": [_plain(one) for one in before]}
        case Abort(why=why):
            fields |= {"why": why[:MAX_WHY_CHARS]}
        case _:
            pass
    return json.dumps(fields).encode()


def decode_message(raw: bytes, *, pair: PairId, sender: MemberId) -> Peer:
    """The message in `raw`, which this member says in this exchange or nothing. Raises BadPairMessage."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadPairMessage(f"no JSON ({type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise BadPairMessage("no JSON object")
    heading = {key: fields.pop(key, None) for key in ("round", "members", "sender")}
    if heading != _heading(pair, sender):
        raise BadPairMessage(f"it is about another exchange than {pair}, or of another member than {sender}")
    kind = fields.pop("kind", None)
    if kind == "offer" and fields.keys() == {"since", "upto", "digest", "rests_on"}:
        since, upto, digest, before = fields["since"], fields["upto"], fields["digest"], fields["rests_on"]
        if _is_span([since, upto]) and isinstance(digest, str) and isinstance(before, list):
            rests_on = tuple(map(_commitment, before))
            return Offer(pair=pair, sender=sender, since=since, upto=upto, digest=digest, rests_on=rests_on)
    elif kind == "abort" and fields.keys() == {"why"} and isinstance(fields["why"], str):
        return Abort(pair=pair, sender=sender, why=fields["why"][:MAX_WHY_CHARS])
    elif isinstance(kind, str) and kind in _KINDS and not fields:
        return _KINDS[kind](pair=pair, sender=sender)
    raise BadPairMessage(f"kind {str(kind)[:40]!r} with {sorted(fields)[:8]}")


def _plain(one: Commitment) -> list[Any]:
    return [one.pair.round_, [[*member, *span] for member, span in zip(one.pair.members, one.spans, strict=True)]]


def _commitment(value: Any) -> Commitment:
    """What `_plain` made. Raises BadPairMessage."""
    match value:
        case [int(round_), [*entries]] if type(round_) is int and entries and all(map(_is_entry, entries)):
            members = tuple(MemberId(name=name, incarnation=incarnation) for name, incarnation, _, _ in entries)
            spans = tuple((since, upto) for _, _, since, upto in entries)
            return Commitment(pair=PairId(round_=round_, members=members), spans=spans)
    raise BadPairMessage(f"it rests on what is no commit: {str(value)[:80]}")


def _is_entry(value: Any) -> bool:
    match value:
        case [str(), incarnation, since, upto]:
            return type(incarnation) is int and _is_span([since, upto])
    return False


def _is_span(value: list[Any]) -> bool:
    return all(type(one) is int for one in value) and 0 <= value[0] <= value[1]


def _heading(pair: PairId, sender: MemberId) -> dict[str, Any]:
    return {"round": pair.round_, "members": [list(member) for member in pair.members], "sender": list(sender)}


def _key(pair: PairId, sender: MemberId, to: MemberId, number: int) -> str:
    return f"said/{pair.round_}/{sender}/{to}/{number}"


# ---------------------------------------------------------------- saying and hearing


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A message has come, to be handed to `PairMail.hear`."""

    message: Peer
    number: int


@dataclass(kw_only=True, slots=True)
class _Ear:
    """Listens to one member of one exchange."""

    pair: PairId
    me: MemberId
    speaker: MemberId
    address: str
    number: int = 0
    busy: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class PairMail:
    """One member's messages, to others and from them. Calls come under the member's lock; fetches run beside it."""

    def __init__(
        self,
        *,
        store: BlobStore,
        transport: Transport,
        do: Callable[[Callable[[], Heard | None]], None],
        retry_s: float,
        waits: bool,
    ) -> None:
        """`do` carries out a job, and gives what comes of it to `hear`: beside training, in threads that may wait.

        `waits` False: at once, where it is asked for, and `listen` is called again whenever there may be something new.
        `retry_s`: when a peer is asked again that could not be reached.
        """
        self._store, self._transport, self._do = store, transport, do
        self._retry_s, self._waits = retry_s, waits
        self._said: dict[tuple[PairId, MemberId], list[Peer]] = {}
        self._ears: dict[tuple[PairId, MemberId], _Ear] = {}
        self.num_bad = 0

    def say(self, to: MemberId, message: Peer) -> None:
        """From now on `to` can hear it. What was said to it before is not said twice: it lies there until it is heard.

        What was said in all but the newest rounds is forgotten.
        """
        said = self._said.setdefault((message.pair, to), [])
        if message in said:
            return
        self._store.put(_key(message.pair, message.sender, to, len(said)), encode_message(message))
        said.append(message)
        rounds = sorted({pair.round_ for pair, _ in self._said})
        for round_ in rounds[:-KEPT_OUTCOMES]:
            self._store.discard(f"said/{round_}")
            self._said = {key: value for key, value in self._said.items() if key[0].round_ != round_}

    def listen(self, me: MemberId, pairs: Collection[PairId], address_of: Callable[[MemberId], str | None]) -> None:
        """From now on hear what the others of exactly these exchanges say."""
        wanted = [(pair, member) for pair in pairs for member in pair.members if member != me]
        for key in self._ears.keys() - set(wanted):
            self._ears.pop(key).over.set()
        for pair, speaker in wanted:
            ear = self._ears.get((pair, speaker))
            if ear is None and (address := address_of(speaker)) is not None:
                ear = self._ears[pair, speaker] = _Ear(pair=pair, me=me, speaker=speaker, address=address)
            if ear is not None and not ear.busy and not ear.over.is_set():
                ear.busy = True
                self._do(lambda ear=ear: self._hear_next(ear))  # type: ignore[misc]

    def hear(self, heard: Heard) -> Peer | None:
        """What a job of `listen` brought; None if nobody listens to that member any more."""
        ear = self._ears.get((heard.message.pair, heard.message.sender))
        if ear is None or ear.number != heard.number:
            return None
        ear.number, ear.busy = ear.number + 1, False
        return heard.message

    def close(self) -> None:
        """Listen to nobody any more, and forget what was said: jobs that wait end within a second."""
        for ear in self._ears.values():
            ear.over.set()
        self._ears, self._said = {}, {}
        self._store.discard("said")

    # ------------------------------------------------------------ in threads

    def _hear_next(self, ear: _Ear) -> Heard | None:
        """Wait for the next message of a member until nobody wants it any more; inline, have one look."""
        key = _key(ear.pair, ear.speaker, ear.me, ear.number)
        while not ear.over.is_set():
            began_s = time.monotonic()
            try:
                (blob,) = self._transport.fetch(
                    ear.address, [key],
                    timeout_s=LISTEN_S + self._retry_s, wait_s=LISTEN_S if self._waits else 0.0,
                    give_up=ear.over.is_set, max_bytes=MAX_MESSAGE_BYTES,
                )  # fmt: skip
                message = decode_message(blob.data.tobytes(), pair=ear.pair, sender=ear.speaker)
            except BadPairMessage as error:
                # As if it were silent: the exchange ends by its timeout, or by what the controller says.
                log.warning("%s is not listened to any more in %s: %s", ear.speaker, ear.pair, error)
                self.num_bad += 1
                ear.over.set()
            except Cancelled:
                break
            except TransportError:
                if not self._waits:
                    break
                ear.over.wait(max(self._retry_s - (time.monotonic() - began_s), 0.0))
            else:
                return Heard(message=message, number=ear.number)
        ear.busy = False
        return None
