"""The tensors of one member: anchors, outer states, live parameters, residuals (protocol 1.4, 1.5, 1.7).

Pure arithmetic around the strategy's parts; knows nothing of members, messages or time. Live parameters are touched
by the training thread only (`encode`, `apply`, `install`, `reset`, `hold_displacement`); everything that reads anchors
from another thread takes `lock`, which the training thread holds while it changes them.
Suffixes: N values of a fragment, C values of one chunk.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from strategies.aggregate import decode_accumulate
from strategies.codecs.base import Codec
from strategies.codecs.feedback import encode_with_feedback
from strategies.codecs.stochastic import keyed
from strategies.decoupled import RadialSum, direction_weight
from strategies.fragments import FragmentSpec, gather, scatter
from strategies.merge import advance_included, carry_over, rebase
from strategies.norm import sum_of_squares
from strategies.outer import OuterStep, Stepped
from strategies.outer_choice import mean_of_results
from strategies.registry import decode_payload, decoder_of
from strategies.robust import Recipe
from strategies.strategy import Strategy
from workers.digest import combine, digest
from workers.in_flight import Part, displacement_of, lands_on_anchor, own_anchor, set_aside
from workers.member_rules import aside_after, residual_after
from workers.memory import ALIGNED_BYTES, Room
from workers.robust import measure_pieces, mix_pieces


class BadPiece(ValueError):
    """A contribution that must not count: malformed, not finite, or not what its offer announced."""


class StateTorn(RuntimeError):
    """A state that was applied or fetched has another digest than its record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One contribution, chunk by chunk: payloads, their digests, sums of squares of what they decode to."""

    payloads: tuple[Tensor, ...]
    digests: tuple[str, ...]
    sumsq: tuple[float, ...]
    num_bytes: int


class Piece(NamedTuple):
    """One contribution's chunk: payload, coefficient, announced sum of squares, samples that it covers."""

    payload: Tensor
    coefficient: float
    sumsq: float
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StateChunk:
    """One chunk of a served state: version and values of anchor and outer states."""

    n: int
    chain: str
    values: tuple[Tensor, ...]


class Replica:
    """Anchors and live parameters of one member."""

    def __init__(
        self, *, specs: Sequence[FragmentSpec], strategy: Strategy, tensors: Mapping[str, Tensor], total_samples: int
    ) -> None:
        """`tensors`: the live parameters by name, fp32; they are read and written in place.

        `variants` may be replaced: `(fragment, n)` -> the strategy of its transition from version `n`, which is the
        given one but for settings that were changed since. `tamper` and `distort` are for faults: what is sent in the
        place of a contribution's payload, and of a result.
        """
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise ValueError(
                    f"parameter {name!r} is {tensor.dtype}; synchronised parameters must be float32 "
                    "(train.precision = 'bf16' computes in bf16 and keeps them in float32)"
                )
        self.specs, self.strategy, self.tensors = tuple(specs), strategy, tensors
        self.total_samples = total_samples
        self.variants: Callable[[int, int], Strategy] = lambda fragment, n: strategy
        self.tamper: Callable[[int, slice, Codec, Tensor, Tensor], Tensor] | None = None
        self.distort: Callable[[Tensor], Tensor] | None = None
        self.lock = threading.RLock()
        device = next(iter(tensors.values())).device
        self.parts = [
            Part(
                anchor=torch.zeros(spec.numel, device=device),
                states=tuple(torch.zeros(spec.numel, device=device) for _ in range(strategy.num_states)),
            )
            for spec in self.specs
        ]

    # ------------------------------------------------------------ versions

    def make_genesis(self, chain: str) -> tuple[str, ...]:
        """Version 0 from the live parameters; returns one digest per fragment."""
        with self.lock:
            for spec, part in zip(self.specs, self.parts, strict=True):
                gather(spec, self.tensors, part.anchor)
                part.n, part.chain = 0, chain
            return tuple(self.digest(f) for f in range(len(self.parts)))

    def digest(self, fragment: int) -> str:
        """Digest of anchor and outer states: what commits seal."""
        part, spec = self.parts[fragment], self.specs[fragment]
        with self.lock:
            return combine([d for c in range(spec.num_chunks) for d in self._chunk_digests(part, spec.chunk_slice(c))])

    @staticmethod
    def _chunk_digests(part: Part, where: slice) -> list[str]:
        return [digest(as_bytes(values[where])) for values in (part.anchor, *part.states)]

    def anchor_tensors(self) -> dict[str, Tensor]:
        """The anchor as named tensors: views where possible, never copies; for reading only."""
        out: dict[str, Tensor] = {}
        for spec, part in zip(self.specs, self.parts, strict=True):
            offset = 0
            for tensor in spec.tensors:
                out[tensor.name] = part.anchor[offset : offset + tensor.numel].view(tensor.shape)
                offset += tensor.numel
        return out

    # ------------------------------------------------------------ contributing

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Add one batch's gradients to what is offered next (strategies that contribute gradients)."""
        for spec, part in zip(self.specs, self.parts, strict=True):
            if part.gradients is None:
                part.gradients = gather(spec, gradients)
            else:
                part.gradients.add_(gather(spec, gradients))

    def encode(self, fragment: int, *, share: float = 1.0, progress: float = 0.0, lossless: bool = False) -> Encoded:
        """Encode the contribution: displacement `D = A - theta` (or the gradients) plus the residual, in chunks.

        `share` (of this member in the sum) and `progress` are for strategies that go on from elsewhere meanwhile.
        Raises `NonFiniteError` if it is not finite. The residual it leaves counts only once the record lists it (C8).
        """
        part, spec = self.parts[fragment], self.specs[fragment]
        strategy = self.variants(fragment, part.n)
        feedback = strategy.error_feedback and not lossless
        payloads: list[Tensor] = []
        next_residual = torch.empty_like(part.anchor) if feedback else None
        sums: list[float] = []
        room = Room(sum(strategy.codec.num_bytes(spec.chunk_values) + ALIGNED_BYTES for _ in range(spec.num_chunks)))
        for chunk in range(spec.num_chunks):
            where = spec.chunk_slice(chunk)
            values_C = self._contribution(part, spec, where)
            codec = keyed(strategy.codec, fragment, part.n, where.start)
            if feedback and next_residual is not None:
                residual = part.residual[where] if part.residual is not None else None
                done = encode_with_feedback(codec, values_C, residual, decay=strategy.feedback_decay)
                payload = done.payload
                next_residual[where] = done.next_residual_N
            else:
                if part.residual is not None and not lossless:  # of a codec that was changed for one that keeps all
                    values_C = values_C + strategy.feedback_decay * part.residual[where]
                payload = codec.encode(values_C)
            if self.tamper is not None:
                payload = self.tamper(fragment, where, codec, values_C, payload)
                sent_C = self._decode(payload, where, fragment)
            else:
                sent_C = codec.decode(payload, num_values=values_C.numel()) if codec.lossy else values_C
            sums.append(float(sum_of_squares(sent_C, backend=codec.backend)))
            payloads.append(torch.from_numpy(room.keep(as_bytes(payload))))
        part.next_residual, part.displacement, part.due, part.sent = next_residual, None, None, True
        if strategy.in_flight != "keep":
            outer = strategy.outer_at(progress)
            set_aside(part, spec, self.tensors, eager=outer if strategy.in_flight == "eager" else None, share=share)
        digests = tuple(digest(as_bytes(payload)) for payload in payloads)
        return Encoded(
            payloads=tuple(payloads), digests=digests, sumsq=tuple(sums), num_bytes=sum(p.numel() for p in payloads)
        )

    def _contribution(self, part: Part, spec: FragmentSpec, where: slice) -> Tensor:
        if self.strategy.contribution == "gradient":
            assert part.gradients is not None, "an offer without gradients"
            return part.gradients[where]
        return displacement_of(part, spec, self.tensors, where)

    def hold_displacement(self, past_due: Sequence[int] = ()) -> None:
        """Before the first step after an offer: keep what was offered, so that progress can be told from it.

        `past_due`: fragments whose result is due and not here; the merge treats the steps from now on otherwise.
        """
        if self.strategy.in_flight != "keep":
            return
        for fragment in past_due if self.strategy.merge_kappa < 1.0 else ():
            late = self.parts[fragment]
            if late.due is None:
                late.due = late.anchor - gather(self.specs[fragment], self.tensors)
        for spec, part in zip(self.specs, self.parts, strict=True):
            if part.sent and part.displacement is None:
                if self.strategy.contribution == "gradient":
                    assert part.gradients is not None
                    part.displacement = part.gradients.clone()
                else:
                    part.displacement = part.anchor - gather(spec, self.tensors)

    # ------------------------------------------------------------ reducing

    def reduce(
        self, fragment: int, chunk: int, pieces: Sequence[Piece], *, n: int, recipe: Recipe | None = None
    ) -> Tensor:
        """Result payload of one chunk from the pieces in roster order, for version `n`; `recipe` None: their sum.

        Raises `BadPiece`, whose second argument is the place in `pieces`, for a piece that must not count.
        """
        if recipe is not None:
            total = mix_pieces(self._checked(fragment, chunk, pieces), recipe, self._history(fragment, chunk, recipe))
        else:
            total = self._sum(fragment, chunk, pieces)
        if self.distort is not None:
            total = self.distort(total)
        return self.variants(fragment, n).result_codec.encode(total).cpu()

    def measure(self, fragment: int, chunk: int, pieces: Sequence[Piece], recipe: Recipe) -> tuple[float, ...]:
        """Squared distances between the pieces of one chunk, as `recipe` has them. Raises `BadPiece`."""
        return measure_pieces(self._checked(fragment, chunk, pieces), recipe, self._history(fragment, chunk, recipe))

    def _history(self, fragment: int, chunk: int, recipe: Recipe) -> Tensor | None:
        """Where a recipe begins from earlier results: their mean, which the outer momentum keeps on all members."""
        part, where = self.parts[fragment], self.specs[fragment].chunk_slice(chunk)
        return mean_of_results(self.strategy.outer_at(1.0), part.states, where) if recipe.history else None

    def _checked(self, fragment: int, chunk: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """What the pieces decode to, each looked at as `_sum` does."""
        where, out = self.specs[fragment].chunk_slice(chunk), []
        for place, piece in enumerate(pieces):
            try:
                values_C = self._decode(piece.payload, where, fragment)
            except ValueError as error:
                raise BadPiece(f"it cannot be decoded: {error}", place) from error
            self._check(float(sum_of_squares(values_C, backend=self.strategy.codec.backend)), piece.sumsq, place)
            out.append(values_C)
        return out

    @staticmethod
    def _check(found: float, announced: float, place: int) -> None:
        if not np.isfinite(found):
            raise BadPiece("it is not finite", place)
        if found != announced:
            raise BadPiece(f"its sum of squares is {found!r}, announced was {announced!r}", place)

    def _sum(self, fragment: int, chunk: int, pieces: Sequence[Piece]) -> Tensor:
        spec = self.specs[fragment]
        where = spec.chunk_slice(chunk)
        num = where.stop - where.start
        acc: Tensor | None = None
        radial = RadialSum(num) if self.strategy.aggregate == "radial" else None
        device = self.parts[fragment].anchor.device
        for place, (payload, coefficient, sumsq, num_samples) in enumerate(pieces):
            try:
                piece = payload.to(device)
                codec = decoder_of(piece, num_values=num, backend=self.strategy.codec.backend)
                if radial is not None:
                    weight = direction_weight(coefficient, num_samples)
                    squares = radial.add(codec, piece, coefficient=coefficient, weight=weight, sumsq=sumsq)
                else:
                    acc, squares = decode_accumulate(codec, piece, coefficient, acc, num_values=num)
            except ValueError as error:
                raise BadPiece(f"it cannot be decoded: {error}", place) from error
            self._check(float(squares), sumsq, place)
        total = acc if radial is None else radial.result()
        assert total is not None, "a roster without contributions"
        return total

    # ------------------------------------------------------------ the next version

    def next_digest(
        self, fragment: int, payloads: Sequence[Tensor], *, base_samples: int,
        known: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> str:  # fmt: skip
        """Digest of the next version under a result, computed chunk by chunk and not stored.

        `known`: what `next_chunk_digests` gave for some of the chunks.
        """
        with self.lock:
            scale = self._scale(fragment, payloads, self.parts[fragment].n, base_samples)
            return combine(
                [
                    digest_hex
                    for chunk in range(len(payloads))
                    for digest_hex in known.get(chunk)
                    or self.next_chunk_digests(fragment, chunk, payloads[chunk], scale, base_samples=base_samples)
                ]
            )

    def next_chunk_digests(
        self, fragment: int, chunk: int, payload: Tensor, scale: Tensor | None = None, *, base_samples: int
    ) -> list[str]:
        """Digests of one chunk of the next version: anchor and outer states. `scale`: see `OuterStep.prepare`."""
        where, n = self.specs[fragment].chunk_slice(chunk), self.parts[fragment].n
        with self.lock:
            anchor, states = self._step(fragment, where, payload, scale, n, base_samples)
            return [digest(as_bytes(values)) for values in (anchor, *states)]

    def _progress(self, base_samples: int) -> float:
        return min(base_samples / self.total_samples, 1.0)

    def _scale(self, fragment: int, payloads: Sequence[Tensor], n: int, base_samples: int) -> Tensor | None:
        outer, spec = self.outer_of(fragment, n, base_samples), self.specs[fragment]
        return outer.prepare(
            self._decode(payload, spec.chunk_slice(chunk), fragment) for chunk, payload in enumerate(payloads)
        )

    def _decode(self, payload: Tensor, where: slice, fragment: int) -> Tensor:
        device = self.parts[fragment].anchor.device
        num, backend = where.stop - where.start, self.strategy.codec.backend
        return decode_payload(payload.to(device), num_values=num, backend=backend)

    def outer_of(self, fragment: int, n: int, base_samples: int) -> OuterStep:
        """The outer step of the transition from version `n`, with `base_samples` committed before it."""
        return self.variants(fragment, n).outer_at(self._progress(base_samples))

    def _step(
        self, fragment: int, where: slice, payload: Tensor, scale: Tensor | None, n: int, base_samples: int,
        base: Stepped | None = None, out: Stepped | None = None,
    ) -> Stepped:  # fmt: skip
        part = self.parts[fragment]
        anchor, states = base or (part.anchor[where], tuple(s[where] for s in part.states))
        return self.outer_of(fragment, n, base_samples).step(
            anchor, states, self._decode(payload, where, fragment), scale=scale, version=n,
            progress=self._progress(base_samples), spec=self.specs[fragment], start=where.start, out=out,
        )  # fmt: skip

    def apply(
        self,
        fragment: int,
        payloads: Sequence[Tensor],
        *,
        n: int,
        chain: str,
        base_samples: int,
        sealed: str,
        included: bool,
    ) -> None:
        """Move to version `n`: new anchor and states, live parameters by merge (included) or translation (not).

        Raises `StateTorn` if the new version has another digest than its record sealed; the state must be fetched.
        """
        spec, part = self.specs[fragment], self.parts[fragment]
        digests: list[str] = []
        lands = lands_on_anchor(part, self.strategy, included=included)
        with self.lock:
            scale = self._scale(fragment, payloads, part.n, base_samples)
            for chunk, payload in enumerate(payloads):
                where = spec.chunk_slice(chunk)
                now_C = part.anchor[where], tuple(state[where] for state in part.states)
                if lands:
                    self._step(fragment, where, payload, scale, part.n, base_samples, out=now_C)
                    scatter(spec, now_C[0], self.tensors, values=where)
                else:
                    anchor_C, states = self._step(fragment, where, payload, scale, part.n, base_samples)
                    self._move(part, spec, where, anchor_C, included=included)
                    for held, new in zip((now_C[0], *now_C[1]), (anchor_C, *states), strict=True):
                        held.copy_(new)
                digests += [digest(as_bytes(values)) for values in (now_C[0], *now_C[1])]
            part.n, part.chain = n, chain
        self._conclude(part, included=included)
        if combine(digests) != sealed:
            raise StateTorn(f"fragment {fragment} version {n}: applied state differs from the sealed digest")

    def _move(self, part: Part, spec: FragmentSpec, where: slice, new_C: Tensor, *, included: bool) -> None:
        theta_C = gather(spec, self.tensors, values=where)
        if self.strategy.in_flight != "keep":
            carry_over(theta_C, own_anchor(part, part.anchor[where], where), own_anchor(part, new_C, where))
        elif included:
            displacement = part.displacement[where] if part.displacement is not None else None
            alpha, kappa = self.strategy.merge_alpha, self.strategy.merge_kappa
            due = part.due[where] if part.due is not None else None
            advance_included(theta_C, part.anchor[where], new_C, displacement, alpha=alpha, kappa=kappa, due_N=due)
        else:
            rebase(theta_C, part.anchor[where], new_C)
        scatter(spec, theta_C, self.tensors, values=where)

    def _conclude(self, part: Part, *, included: bool) -> None:
        part.residual = residual_after(part.residual, part.next_residual, included=included)
        if included:
            if part.gradients is not None:
                if part.displacement is None:
                    part.gradients = None
                else:
                    part.gradients.sub_(part.displacement)
        part.aside = aside_after(part.aside, included=included)
        part.next_residual, part.displacement, part.due, part.sent = None, None, None, False

    # ------------------------------------------------------------ states of others

    def serve(self, fragment: int, chunk: int) -> bytes:
        """One chunk of the present state with its version, as bytes."""
        spec, part = self.specs[fragment], self.parts[fragment]
        with self.lock:
            if part.n < 0:
                raise KeyError(f"no state of fragment {fragment} yet")
            where = spec.chunk_slice(chunk)
            head = json.dumps({"n": part.n, "chain": part.chain}).encode()
            body = b"".join(as_bytes(values[where]).tobytes() for values in (part.anchor, *part.states))
        return len(head).to_bytes(4, "little") + head + body

    def parse_state(self, fragment: int, chunk: int, data: memoryview) -> StateChunk:
        """The chunk that a donor served; `BadPiece` if it is malformed."""
        spec = self.specs[fragment]
        where = spec.chunk_slice(chunk)
        num, vectors = where.stop - where.start, 1 + self.strategy.num_states
        size = int.from_bytes(data[:4], "little")
        if size > 4096 or len(data) != 4 + size + 4 * num * vectors:
            raise BadPiece(f"state chunk {chunk} has {len(data)} bytes", 0)
        try:
            head = json.loads(bytes(data[4 : 4 + size]))
            n, chain = int(head["n"]), str(head["chain"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadPiece(f"state chunk {chunk} has no readable header", 0) from error
        flat = torch.from_numpy(np.frombuffer(data, dtype=np.float32, offset=4 + size).copy())
        return StateChunk(n=n, chain=chain, values=tuple(flat.view(vectors, num)))

    def step_chunk(
        self,
        fragment: int,
        chunk: int,
        state: StateChunk,
        payloads: Sequence[Tensor],
        *,
        n: int,
        chain: str,
        base_samples: int,
    ) -> StateChunk:
        """Bring a fetched chunk from version n-1 to `n` with that version's result (H10)."""
        where = self.specs[fragment].chunk_slice(chunk)
        device = self.parts[fragment].anchor.device
        base = (state.values[0].to(device), tuple(v.to(device) for v in state.values[1:]))
        scale = self._scale(fragment, payloads, n - 1, base_samples)
        anchor, states = self._step(fragment, where, payloads[chunk], scale, n - 1, base_samples, base)
        return StateChunk(n=n, chain=chain, values=(anchor.cpu(), *(s.cpu() for s in states)))

    @staticmethod
    def digest_of_chunks(chunks: Sequence[StateChunk]) -> str:
        """Digest that `digest` would give for these chunks."""
        return combine([digest(as_bytes(values)) for chunk in chunks for values in chunk.values])

    def install(self, fragment: int, chunks: Sequence[StateChunk], *, included: bool, fresh: bool) -> None:
        """Take over a fetched state. `fresh`: live := anchor; else live parameters keep their open displacement."""
        spec, part = self.specs[fragment], self.parts[fragment]
        with self.lock:
            for chunk, state in enumerate(chunks):
                where = spec.chunk_slice(chunk)
                new_C = state.values[0].to(part.anchor.device)
                if not fresh and self.strategy.contribution == "displacement":
                    theta_C = gather(spec, self.tensors, values=where)
                    left = own_anchor(part, part.anchor[where], where) - theta_C
                    if included and self.strategy.in_flight == "keep":
                        left = left - (part.displacement[where] if part.displacement is not None else left)
                    scatter(spec, own_anchor(part, new_C, where) - left, self.tensors, values=where)
                part.anchor[where] = new_C
                for own, value in zip(part.states, state.values[1:], strict=True):
                    own[where] = value.to(own.device)
            part.n, part.chain = chunks[0].n, chunks[0].chain
        self._conclude(part, included=included)
        if fresh:
            part.aside = part.correction = None
        if fresh or self.strategy.contribution == "gradient":
            scatter(spec, part.anchor, self.tensors)

    def reset(self) -> None:
        """Drop everything that is not committed: live := anchor, residual := 0 (H4, H9)."""
        for fragment, part in enumerate(self.parts):
            if part.n >= 0:
                self._clear(fragment)

    def _clear(self, fragment: int) -> None:
        part = self.parts[fragment]
        scatter(self.specs[fragment], part.anchor, self.tensors)
        part.residual = part.next_residual = part.displacement = part.gradients = part.due = None
        part.aside = part.correction = None
        part.sent = False


def as_bytes(values: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, without a copy on the CPU."""
    return values.detach().contiguous().cpu().view(torch.uint8).numpy()
