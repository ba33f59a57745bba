"""Vectors of a pipeline on their way between peers: gradients to owners, sums to everybody, states to newcomers.

Everything is pulled by key, in chunks of equal length (`PipelineSpec.chunks`): `piece/<step>/<round>/<peer>/<number>`,
`result/<step>/<round>/<attempt>` and `state/<stage>/<version>`, each with unit and chunk behind it. Gradients and sums
are encoded by the run's codec, a sum once by its owner, so that all decode the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.aggregate import accumulate
from strategies.codecs.base import Codec
from strategies.codecs.feedback import encode_with_feedback
from strategies.codecs.stochastic import keyed
from strategies.registry import build_codec, decode_payload
from strategies.strategy import result_codec_of
from workers.pipeline.messages import Part, Reduce, Spread
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.state import Flats, StageState, fields_of
from workers.store import BlobStore
from workers.transport.base import MAX_KEYS, Transport
from workers.transport.errors import BlobMissing, TransportError

FETCH_TIMEOUT_S = 30.0
PROBE = "probe"
"""Of a trainer: as many bytes as a boundary tensor has."""
PROBE_TIMEOUT_S, MAX_PROBE_BYTES = 5.0, 4 << 20


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a microbatch in nats per token, in fp32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


class Pieces:
    """What one peer publishes and fetches; see the module."""

    def __init__(self, spec: PipelineSpec, store: BlobStore, transport: Transport) -> None:
        self._spec, self._store, self._transport = spec, store, transport
        self._codec: Codec = build_codec(spec.codec, key=spec.train.seed)
        self._result_codec = result_codec_of(self._codec)

    # ------------------------------------------------------------ publishing

    def publish(self, prefix: str, flats: dict[str, Tensor], *, counters: Sequence[int] = ()) -> None:
        """Encode vectors and keep their chunks under `<prefix>/<unit>/<chunk>`; nothing where they are there.

        `counters`: what tells these from every other one, for codecs that round at random.
        """
        for place, (unit, flat) in enumerate(sorted(flats.items())):
            for number, part in enumerate(self._spec.chunks(unit)):
                key = f"{prefix}/{unit}/{number}"
                if key not in self._store:
                    codec = keyed(self._codec, *counters, place, number)
                    self._store.put(key, codec.encode(flat[part].contiguous()).numpy())

    def publish_work(
        self, prefix: str, flats: dict[str, Tensor], residuals: dict[str, Tensor], *, counters: Sequence[int]
    ) -> dict[str, Tensor]:
        """The same of displacements, with what the codec lost of earlier ones; returns what it loses of these."""
        lost = {unit: torch.empty_like(flat) for unit, flat in flats.items()}
        for place, (unit, flat) in enumerate(sorted(flats.items())):
            for number, part in enumerate(self._spec.chunks(unit)):
                codec = keyed(self._codec, *counters, place, number)
                kept = residuals[unit][part] if unit in residuals else None
                found = encode_with_feedback(
                    codec, flat[part].contiguous(), kept, decay=self._spec.codec.feedback_decay
                )
                lost[unit][part] = found.next_residual_N
                self._store.put(f"{prefix}/{unit}/{number}", found.payload.numpy())
        keeps = self._spec.codec.error_feedback and self._codec.lossy
        return lost if keeps else {}

    def publish_state(self, state: StageState) -> None:
        """Let others pull this version; the one before can be had no longer."""
        prefix = f"state/{state.stage}"
        for (unit, field), flat in state.flats.items():
            for number, part in enumerate(self._spec.chunks(unit)):
                self._store.put(f"{prefix}/{state.version}/{unit}/{field}/{number}", flat[part].numpy())
        for key in self._store.keys(prefix):
            if not key.startswith(f"{prefix}/{state.version}/"):
                self._store.discard(key)

    def forget(self, step: int) -> None:
        """The step is applied: its gradients go, and the sums of the one before (the slow may still fetch its own)."""
        self._store.discard(f"piece/{step}")
        for key in self._store.keys("result"):
            if int(key.split("/")[1]) < step:
                self._store.discard(key)

    # ------------------------------------------------------------ reducing

    def reduce(self, order: Reduce) -> tuple[tuple[int, float], ...]:
        """Add the chunks of all parts, encode and keep the sums; returns their sums of squares, in fp64."""
        totals = [self._add(order, group) for group in order.groups]
        found = []
        for number in order.chunks:
            total = totals[0][number]
            for other in totals[1:]:
                total = torch.add(total, other[number])
            payload = self._result_codec.encode(total)
            key = f"result/{order.step}/{order.round_}/{order.attempt}/{order.unit}/{number}"
            self._store.put(key, payload.numpy())
            decoded = decode_payload(payload, num_values=total.numel())
            found.append((number, float(decoded.double().square().sum())))
        return tuple(found)

    def _add(self, order: Reduce, group: Sequence[Part]) -> dict[int, Tensor]:
        """The sum of one group, in order of its numbers, whoever holds them."""
        chunks = self._spec.chunks(order.unit)
        pieces: dict[tuple[int, str, int], Tensor] = {}
        for part in group:
            keys = [
                (f"piece/{order.step}/{order.round_}/{part.peer}/{m}/{order.unit}/{number}", (m, part.peer, number))
                for m in part.numbers
                for number in order.chunks
            ]
            sizes = [chunks[number].stop - chunks[number].start for _, (_, _, number) in keys]
            for (_, where), value in zip(keys, self._fetch(part.address, [k for k, _ in keys], sizes), strict=True):
                pieces[where] = value
        totals: dict[int, Tensor | None] = dict.fromkeys(order.chunks)
        weights = {part.peer: part.weight for part in group}
        for (_, peer, number), value in sorted(pieces.items(), key=lambda item: item[0]):
            totals[number] = accumulate(totals[number], value, weights[peer])
        return {number: _there(total) for number, total in totals.items()}

    def results(self, order: Spread) -> dict[str, Tensor]:
        """The reduced vectors of a stage, from the owners of their chunks."""
        out = {unit: torch.empty(self._spec.num_values(unit)) for unit, _, _, _ in order.owners}
        by_owner: dict[str, list[tuple[str, int, int]]] = {}
        for unit, number, attempt, address in order.owners:
            by_owner.setdefault(address, []).append((unit, number, attempt))
        prefix = f"result/{order.step}/{order.round_}"

        def take(owner: tuple[str, list[tuple[str, int, int]]]) -> None:
            address, wanted = owner
            parts = [self._spec.chunks(unit)[number] for unit, number, _ in wanted]
            keys = [f"{prefix}/{attempt}/{unit}/{number}" for unit, number, attempt in wanted]
            values = self._fetch(address, keys, [part.stop - part.start for part in parts], self._result_codec)
            for (unit, _, _), part, value in zip(wanted, parts, values, strict=True):
                out[unit][part] = value

        with ThreadPoolExecutor(max_workers=max(len(by_owner), 1)) as pool:
            list(pool.map(take, by_owner.items()))
        return out

    def _fetch(self, address: str, keys: list[str], sizes: list[int], codec: Codec | None = None) -> list[Tensor]:
        """Decoded vectors of these lengths; from this process's own store without a connection."""
        blobs = self._blobs(address, keys, list(map((codec or self._codec).num_bytes, sizes)))
        pairs = zip(blobs, sizes, strict=True)
        return [decode_payload(torch.from_numpy(data), num_values=size) for data, size in pairs]

    def _blobs(self, address: str, keys: list[str], num_bytes: list[int]) -> list:  # type: ignore[type-arg]
        import numpy as np

        if address == self._transport.address:
            found = []
            for key in keys:
                data = self._store.get(key)
                if data is None:
                    raise BlobMissing(peer=address, keys=(key,), cause="it is not in this store")
                found.append(np.frombuffer(data, dtype=np.uint8).copy())
            return found
        out = []
        for start in range(0, len(keys), MAX_KEYS):
            some = slice(start, start + MAX_KEYS)
            limit = sum(num_bytes[some])
            blobs = self._transport.fetch(address, keys[some], timeout_s=FETCH_TIMEOUT_S, max_bytes=limit)
            out += [blob.data for blob in blobs]
        return out

    # ------------------------------------------------------------ links

    def probe(self, addresses: Sequence[str], clock: Callable[[], float]) -> float:
        """Mean seconds of a boundary tensor from these trainers, without those that do not answer.

        Raises TransportError where none does.
        """
        found, failure = [], None
        for address in addresses:
            try:
                for _ in range(2):  # the first one opens the connection
                    began_s = clock()
                    self._transport.fetch(address, (PROBE,), timeout_s=PROBE_TIMEOUT_S, max_bytes=MAX_PROBE_BYTES)
                    took_s = clock() - began_s
                found.append(took_s)
            except TransportError as error:
                failure = error
        if failure is not None and not found:
            raise failure
        return sum(found) / len(found) if found else 0.0

    # ------------------------------------------------------------ states

    def pull(self, stage: int, version: int, sources: Sequence[str], units: Sequence[str] | None = None) -> Flats:
        """The state of a stage, its chunks dealt to the sources; a source that fails leaves its chunks to the others.

        Raises TransportError if none of them has some chunk.
        """
        wanted = [
            (unit, field, number)
            for unit in units or self._spec.units_of(stage)
            for field in fields_of(self._spec)
            for number in range(len(self._spec.chunks(unit)))
        ]
        flats = {(unit, field): torch.empty(self._spec.num_values(unit)) for unit, field, _ in wanted}
        left, answering, failure = wanted, list(sources), None
        while left and answering:
            dealt: dict[str, list[tuple[str, str, int]]] = {}
            for place, one in enumerate(left):
                dealt.setdefault(answering[place % len(answering)], []).append(one)
            with ThreadPoolExecutor(max_workers=max(len(dealt), 1)) as pool:
                jobs = {
                    address: pool.submit(self._pull_some, address, stage, version, some, flats)
                    for address, some in dealt.items()
                }
            left = []
            for address, job in jobs.items():
                error = job.exception()
                if isinstance(error, TransportError):
                    failure, left = error, [*left, *dealt[address]]
                    answering.remove(address)
                elif error is not None:
                    raise error
        if not left:
            return flats
        assert failure is not None, "something was left"
        raise failure

    def _pull_some(
        self, address: str, stage: int, version: int, wanted: Sequence[tuple[str, str, int]], flats: Flats
    ) -> None:
        keys = [f"state/{stage}/{version}/{unit}/{field}/{number}" for unit, field, number in wanted]
        parts = [self._spec.chunks(unit)[number] for unit, _, number in wanted]
        for (unit, field, _), part, data in zip(
            wanted, parts, self._blobs(address, keys, [4 * (part.stop - part.start) for part in parts]), strict=True
        ):
            flats[unit, field][part] = torch.from_numpy(data).view(torch.float32)


def _there(total: Tensor | None) -> Tensor:
    assert total is not None, "every chunk has a contribution"
    return total
