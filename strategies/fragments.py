"""Fragments: which tensors are synchronised together, and where each value lies in the flat fragment.

Source: Streaming DiLoCo (arXiv 2501.18512), section 2: the parameters are split into P disjoint fragments of whole
layers, `sequential` (contiguous blocks of layers) or `strided` (fragment p holds the layers p, p + P, p + 2P, ...).
Torch is not imported here: the controller plans with names and shapes alone. Shape suffix: N = values of a fragment.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from strategies.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

Pattern = Literal["sequential", "strided"]

CHUNKS_PER_FRAGMENT = 16
MIN_CHUNK_VALUES = 4096
MAX_CHUNK_VALUES = 262_144


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name and shape of one parameter."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values; 1 for a scalar."""
        return math.prod(self.shape)


class Overlap(NamedTuple):
    """What a range of a flat fragment and one tensor have in common."""

    tensor: TensorSpec
    in_range: slice
    in_tensor: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class FragmentSpec:
    """Tensors that are synchronised together, laid out one after the other in a flat vector of `numel` values.

    The flat vector is cut into chunks of `chunk_values` values (the last one may be shorter): the unit of encoding,
    transfer and outer step.
    """

    index: int
    tensors: tuple[TensorSpec, ...]
    chunk_values: int
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields and lay the tensors out."""
        if self.chunk_values < 1:
            raise ValueError(f"fragment {self.index}: chunk_values = {self.chunk_values}; it must be at least 1")
        object.__setattr__(self, "_offsets", tuple(accumulate((t.numel for t in self.tensors), initial=0)))

    @property
    def numel(self) -> int:
        """Number of values in the fragment."""
        return self._offsets[-1]

    @property
    def num_chunks(self) -> int:
        """Number of chunks; 0 for an empty fragment."""
        return -(-self.numel // self.chunk_values)

    def chunk_slice(self, chunk: int) -> slice:
        """Return the values of the flat fragment that chunk number `chunk` holds."""
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"fragment {self.index} has {self.num_chunks} chunks; chunk {chunk} does not exist")
        start = chunk * self.chunk_values
        return slice(start, min(start + self.chunk_values, self.numel))

    def overlaps(self, start: int, stop: int) -> Iterator[Overlap]:
        """Yield, in order, what each tensor has of the flat values `start:stop`. Raises IndexError outside."""
        if not 0 <= start <= stop <= self.numel:
            raise IndexError(f"fragment {self.index} has {self.numel} values; {start}:{stop} lies outside")
        for place in range(max(0, bisect_right(self._offsets, start) - 1), len(self.tensors)):
            first = self._offsets[place]
            if first >= stop:
                return
            begin, end = max(first, start), min(self._offsets[place + 1], stop)
            if begin < end:
                yield Overlap(self.tensors[place], slice(begin - start, end - start), slice(begin - first, end - first))


def default_chunk_values(numel: int, block: int = 4096) -> int:
    """Return a chunk size for a fragment of `numel` values: about 16 chunks, a multiple of the codec's `block`.

    Between 4,096 and 262,144 values (at most 1 MiB of fp32: one chunk and its temporaries stay in a core's cache),
    unless one block alone is larger.
    """
    if numel < 0 or block < 1:
        raise ValueError(f"numel = {numel}, block = {block}: numel must be at least 0 and block at least 1")
    wanted = min(max(-(-numel // CHUNKS_PER_FRAGMENT), MIN_CHUNK_VALUES), MAX_CHUNK_VALUES)
    rounded_up = -(-wanted // block) * block
    if rounded_up <= MAX_CHUNK_VALUES:
        return rounded_up
    return max(MAX_CHUNK_VALUES // block, 1) * block


def plan_fragments(
    tensors: Sequence[TensorSpec],
    *,
    num_fragments: int,
    pattern: Pattern,
    groups: Sequence[Sequence[str]] = (),
    chunk_values: int | None = None,
    block: int = 4096,
) -> tuple[FragmentSpec, ...]:
    """Deal every tensor to exactly one of `num_fragments` fragments; inside a fragment the given order is kept.

    A layer is the set of tensors whose names agree up to the first component that is a number
    (`model.layers.3.mlp.up_proj.weight`: `model.layers.3`). What comes before the first layer (embeddings) goes
    with the first fragment, what comes after it and belongs to none (final norm, head) with the last. In a model
    without numbered names each module (the name without its last component) counts as a layer.

    `groups` take the place of `num_fragments` and `pattern`: for each fragment patterns of names (`*`, `?`, `[abc]`),
    of which the first that fits decides.

    `chunk_values`: one size for all; None chooses per fragment, a multiple of `block` (`default_chunk_values`).
    Raises ValueError for duplicate names and when there are fewer layers than fragments.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"tensor names must be unique; given more than once: {', '.join(twice)}")
    if num_fragments < 1:
        raise SettingError(f"strategy.num_fragments = {num_fragments}; it must be at least 1")
    members: list[list[TensorSpec]] = [[] for _ in range(num_fragments)]
    if groups:
        members, places = [[] for _ in groups], _group_of_each(names, groups)
    else:
        places = _fragment_of_each(names, num_fragments, pattern)
    for tensor, fragment in zip(tensors, places, strict=True):
        members[fragment].append(tensor)
    return tuple(
        FragmentSpec(
            index=index,
            tensors=tuple(group),
            chunk_values=chunk_values or default_chunk_values(sum(t.numel for t in group), block),
        )
        for index, group in enumerate(members)
    )


def _group_of_each(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[int]:
    """Raises SettingError for a name that fits nowhere, and for a fragment in which nothing is left."""
    places = []
    for name in names:
        fits = (place for place, patterns in enumerate(groups) if any(fnmatchcase(name, one) for one in patterns))
        place = next(fits, None)
        if place is None:
            raise SettingError(
                f"strategy.fragments: parameter {name!r} fits no pattern and would never be synchronised; add one, or "
                "'*' to the last fragment"
            )
        places.append(place)
    for place, patterns in enumerate(groups):
        if place not in places:
            raise SettingError(
                f"strategy.fragments: no parameter is left for fragment {place}, {list(patterns)!r}; remove it, or "
                f"correct its patterns (parameters are called {names[0]!r}, {names[-1]!r})"
            )
    return places


def _fragment_of_each(names: Sequence[str], num_fragments: int, pattern: Pattern) -> list[int]:
    if num_fragments == 1:
        return [0] * len(names)
    keys = [_layer_key(name) for name in names]
    if not any(keys):
        keys = [name.rpartition(".")[0] or name for name in names]
    layers = {key: number for number, key in enumerate(dict.fromkeys(key for key in keys if key))}
    if len(layers) < num_fragments:
        raise SettingError(
            f"strategy.num_fragments = {num_fragments}, but the model has {len(layers)} layers and a fragment holds "
            f"whole layers: set it to {max(len(layers), 1)} or less"
        )
    fragments, seen_layer = [], False
    for key in keys:
        if key:
            seen_layer = True
            fragments.append(fragment_of_layer(layers[key], len(layers), num_fragments=num_fragments, pattern=pattern))
        else:
            fragments.append(num_fragments - 1 if seen_layer else 0)
    return fragments


def fragment_of_layer(layer: int, num_layers: int, *, num_fragments: int, pattern: Pattern) -> int:
    """The fragment of layer number `layer` of `num_layers`: strided or in contiguous blocks."""
    return layer % num_fragments if pattern == "strided" else layer * num_fragments // num_layers


def _layer_key(name: str) -> str:
    """Return the name up to its first numeric component, '' if it has none."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return ""


def gather(
    spec: FragmentSpec, tensors: Mapping[str, Tensor], out: Tensor | None = None, *, values: slice | None = None
) -> Tensor:
    """Copy the fragment, or the part `values` (a `chunk_slice`) of it, out of the tensors into a flat vector.

    `out` has as many values as asked for and is returned; None makes one of the first tensor's type and device.
    Raises ValueError naming the tensor that is missing or misshapen, or when `out` has the wrong size.
    """
    start, stop = _range(spec, values)
    if out is None:
        out = _checked(spec, spec.tensors[0], tensors).new_empty(stop - start)
    _check_size(spec, "out", out, stop - start)
    for tensor, in_range, in_tensor in spec.overlaps(start, stop):
        out[in_range].copy_(_checked(spec, tensor, tensors).detach().reshape(-1)[in_tensor])
    return out


def scatter(spec: FragmentSpec, flat_N: Tensor, tensors: Mapping[str, Tensor], *, values: slice | None = None) -> None:
    """Copy a flat fragment, or the part `values` of it, into the tensors: the inverse of `gather`.

    Raises ValueError naming the tensor that is missing, misshapen or not contiguous, or if `flat_N` has the wrong size.
    """
    start, stop = _range(spec, values)
    _check_size(spec, "flat_N", flat_N, stop - start)
    for tensor, in_range, in_tensor in spec.overlaps(start, stop):
        target = _checked(spec, tensor, tensors).detach()
        if not target.is_contiguous():
            raise ValueError(
                f"tensor {tensor.name!r} of fragment {spec.index} is not contiguous; store it contiguously"
            )
        target.view(-1)[in_tensor].copy_(flat_N[in_range])


def _range(spec: FragmentSpec, values: slice | None) -> tuple[int, int]:
    if values is None:
        return 0, spec.numel
    start, stop, step = values.indices(spec.numel)
    if step != 1 or start > stop:
        raise ValueError(f"fragment {spec.index}: {values} is not a contiguous range of its {spec.numel} values")
    return start, stop


def _check_size(spec: FragmentSpec, name: str, flat: Tensor, wanted: int) -> None:
    if flat.dim() != 1 or flat.numel() != wanted:
        raise ValueError(f"fragment {spec.index}: {name} has shape {tuple(flat.shape)}, expected ({wanted},)")


def _checked(spec: FragmentSpec, tensor: TensorSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    found = tensors.get(tensor.name)
    if found is None:
        raise ValueError(f"tensor {tensor.name!r} of fragment {spec.index} is missing")
    if tuple(found.shape) != tensor.shape:
        raise ValueError(
            f"tensor {tensor.name!r} of fragment {spec.index} has shape {tuple(found.shape)}, planned {tensor.shape}"
        )
    return found
