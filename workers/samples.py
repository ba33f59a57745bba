"""Where an island's samples come from: the run's pack of tokens, or a dataset that the loop brings itself.

The controller leases positions; a keyed permutation turns them into sample numbers (`workers/data/permutation.py`);
a source turns those into a batch. So any dataset with numbered samples is accounted for in the same ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.config import DataConfig
from workers.data.index import ShardIndex
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.loop_checks import LoopError
from workers.scopes import Scopes

Ids: TypeAlias = NDArray[np.int64]
Collate: TypeAlias = Callable[[list[Any]], Any]


class SampleSource(Protocol):
    """Numbered samples for training, and a fixed set to evaluate on."""

    num_samples: int
    num_own: int
    tokens_per_sample: int

    @property
    def num_validation(self) -> int:
        """Samples to evaluate on; 0 where there are none."""

    def batch(self, ids: Ids) -> Any:
        """The training samples with these numbers, (B,), as one batch on the model's device."""

    def validation(self, ids: Ids) -> Any:
        """The validation samples with these numbers, as one batch on the model's device."""

    def is_here(self, ids: Ids) -> bool:
        """Whether nothing has to be fetched for these training samples."""

    def fetch(self, ids: Ids) -> None:
        """Get what these training samples need, now."""

    def want(self, ids: Ids) -> None:
        """These will be asked for, in this order."""

    def close(self) -> None:
        """Nothing is asked for any more."""


class PackSamples:
    """The run's pack: a batch is int64 tokens (B, seq_len + 1), a sample counts as `seq_len` tokens.

    Samples of the pack that only this island has follow those of the run's, from number `num_samples` on.
    """

    def __init__(self, reader: PackReader, device: torch.device, own: PackReader | None = None) -> None:
        """`reader`: the opened pack; `own`: that of this island alone."""
        self.reader, self.own, self.device = reader, own, device
        self.num_samples = reader.num_samples("train")
        self.num_own = own.num_samples("train") if own is not None else 0
        self.tokens_per_sample = reader.index.seq_len

    @property
    def num_validation(self) -> int:
        """Windows of the validation part."""
        return self.reader.num_samples("val")

    def batch(self, ids: Ids) -> Tensor:
        """See `SampleSource.batch`."""
        if self.own is None:
            return torch.from_numpy(self.reader.batch(ids)).to(self.device)
        mine = ids >= self.num_samples
        tokens = np.empty((len(ids), self.tokens_per_sample + 1), dtype=np.int64)
        tokens[~mine] = self.reader.batch(ids[~mine])
        tokens[mine] = self.own.batch(ids[mine] - self.num_samples)
        return torch.from_numpy(tokens).to(self.device)

    def _shards_of(self, ids: Ids) -> list[ShardIndex]:
        return self.reader.shards_of(ids[ids < self.num_samples])

    def validation(self, ids: Ids) -> Tensor:
        """See `SampleSource.validation`."""
        return torch.from_numpy(self.reader.batch(ids, "val")).to(self.device)

    def is_here(self, ids: Ids) -> bool:
        """See `SampleSource.is_here`."""
        return self.reader.cache is None or self.reader.cache.has(self._shards_of(ids))

    def fetch(self, ids: Ids) -> None:
        """See `SampleSource.fetch`. Raises DataError."""
        for shard in self._shards_of(ids) if self.reader.cache is not None else ():
            self.reader.cache.ensure(shard)

    def want(self, ids: Ids) -> None:
        """See `SampleSource.want`."""
        if self.reader.cache is not None:
            self.reader.cache.want(self._shards_of(ids))

    def close(self) -> None:
        """See `SampleSource.close`."""
        if self.reader.cache is not None:
            self.reader.cache.close()


class DatasetSamples:
    """The loop's own data: `data.samples` numbered samples, each of which counts as one token.

    A dataset is an array or tensor, a tuple or dict of them with the samples along the first axis (a batch is then the
    same of their rows), or anything with `len()` and `[number]`, such as a map-style `torch.utils.data.Dataset` (a
    batch is then what `collate` makes of a list of samples).
    """

    tokens_per_sample = 1
    num_own = 0

    def __init__(
        self,
        dataset: Any,
        val_dataset: Any,
        *,
        collate: Collate | None,
        num_samples: int,
        device: torch.device,
    ) -> None:
        """`dataset` None: the loop asks for numbers alone (`island.samples()`). Raises LoopError."""
        self.num_samples, self.device = num_samples, device
        self._train = None if dataset is None else _rows_of(dataset, collate, "dataset")
        self._val = None if val_dataset is None else _rows_of(val_dataset, collate, "val_dataset")
        if self._train is not None and self._train.size != num_samples:
            raise LoopError(
                f"the dataset has {self._train.size} samples and data.samples = {num_samples}: the order of samples "
                "depends on their number, so it must be the same on every island; set it to the size of the dataset"
            )

    @property
    def num_validation(self) -> int:
        """Samples of `val_dataset`."""
        return 0 if self._val is None else self._val.size

    def batch(self, ids: Ids) -> Any:
        """See `SampleSource.batch`."""
        if self._train is None:
            raise LoopError(
                "island.batches() needs something to read: give atoll.Island(..., dataset=...), or iterate over "
                "island.samples(), which yields the numbers of the samples"
            )
        return to_device(self._train.take(ids), self.device)

    def validation(self, ids: Ids) -> Any:
        """See `SampleSource.validation`."""
        assert self._val is not None, "nothing to evaluate on"
        return to_device(self._val.take(ids), self.device)

    def is_here(self, ids: Ids) -> bool:
        """A dataset that the loop brings is here."""
        return True

    def fetch(self, ids: Ids) -> None:
        """Nothing to fetch."""

    def want(self, ids: Ids) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to end."""


class _Rows:
    """A dataset whose size is known and that gives several samples at once."""

    def __init__(self, size: int, take: Callable[[Ids], Any]) -> None:
        self.size, self.take = size, take


def num_samples_of(dataset: Any) -> int:
    """How many samples a dataset has; raises LoopError if it is none."""
    return _rows_of(dataset, None, "dataset").size


def _rows_of(dataset: Any, collate: Collate | None, name: str) -> _Rows:
    if _is_array(dataset):
        rows = _Rows(len(dataset), lambda ids: _take(dataset, ids))
    elif isinstance(dataset, tuple) and dataset and all(map(_is_array, dataset)):
        size = _common_size(dict(enumerate(dataset)), name)
        rows = _Rows(size, lambda ids: tuple(_take(part, ids) for part in dataset))
    elif isinstance(dataset, Mapping) and dataset and all(map(_is_array, dataset.values())):
        size = _common_size(dataset, name)
        rows = _Rows(size, lambda ids: {key: _take(part, ids) for key, part in dataset.items()})
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping | str):
        rows = _Rows(len(dataset), lambda ids: _collated(dataset, ids, collate))
    else:
        raise LoopError(
            f"{name} is a {type(dataset).__qualname__}: give arrays or tensors with the samples along the first axis "
            "(one, a tuple or a dict of them), or an object with len() and [number]. Samples are leased by their "
            "number, so a stream without numbers, an IterableDataset or a DataLoader, cannot be accounted for"
        )
    if rows.size < 1:
        raise LoopError(f"{name} is empty")
    return rows


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _common_size(parts: Mapping[Any, Any], name: str) -> int:
    sizes = {key: len(part) for key, part in parts.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"[{key!r}] has {size}" for key, size in sizes.items())
        raise LoopError(f"the parts of {name} have different numbers of samples: {told}")
    return next(iter(sizes.values()))


def _take(part: Any, ids: Ids) -> Tensor:
    """Rows of an array, as a tensor."""
    if isinstance(part, Tensor):
        return part[torch.from_numpy(ids).to(part.device)]
    return torch.from_numpy(np.ascontiguousarray(part[ids]))


def _collated(dataset: Any, ids: Ids, collate: Collate | None) -> Any:
    numbers = ids.tolist()
    samples = dataset.__getitems__(numbers) if hasattr(dataset, "__getitems__") else [dataset[i] for i in numbers]
    if collate is not None:
        return collate(samples)
    from torch.utils.data import default_collate

    return default_collate(samples)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on `device`: in tuples, lists and dicts as well; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def check_own_data(
    data: DataConfig, *, loss_fn: object, dataset: Any, val_dataset: Any, collate: Collate | None
) -> None:
    """Look at what a loop brings, before anything starts; raises LoopError."""
    if val_dataset is not None and loss_fn is None:
        raise LoopError("val_dataset is evaluated with loss_fn(model, batch): give atoll.Island a loss_fn as well")
    if data.samples is not None:
        device = torch.device("cpu")
        DatasetSamples(dataset, val_dataset, collate=collate, num_samples=data.samples, device=device)


def open_source(
    data: DataConfig,
    pack: PackReader | None,
    *,
    dataset: Any,
    val_dataset: Any,
    collate: Collate | None,
    device: torch.device,
    own: PackReader | None = None,
) -> SampleSource:
    """The source that `[data]` and the loop's arguments describe; raises LoopError where they do not fit."""
    if pack is None:
        assert data.samples is not None, "a run without a pack has data.samples"
        return DatasetSamples(dataset, val_dataset, collate=collate, num_samples=data.samples, device=device)
    if dataset is not None or val_dataset is not None:
        size = "the size of the dataset" if dataset is None else num_samples_of(dataset)
        raise LoopError(
            f"the loop brings a dataset of its own, and the run trains on {data.path or data.corpus!r}: set "
            f"data.samples = {size} instead of data.path or data.corpus"
        )
    return PackSamples(pack, device, own)


def numbers_of(positions: Ids, source: SampleSource, *, scopes: Scopes, name: str, seed: int) -> Ids:
    """Sample numbers at positions of the run, in the order of the run's pack or of that of this island alone."""
    start, stop = scopes.own.get(name, (0, 0))
    if start == stop:
        return sample_ids(positions, size=source.num_samples, seed=seed)
    mine = (positions >= start) & (positions < stop)
    ids = np.empty_like(positions)
    ids[~mine] = sample_ids(positions[~mine], size=source.num_samples, seed=seed)
    ids[mine] = source.num_samples + sample_ids(positions[mine] - start, size=source.num_own, seed=seed)
    return ids


def evenly_spread(num_samples: int, count: int) -> Ids:
    """`count` sample numbers (at most all) at equal distances: the same set in every evaluation."""
    count = min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // max(count, 1)


def cut(ids: Ids, size: int) -> Iterator[Ids]:
    """Pieces of at most `size`."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def positions_of(ranges: Sequence[tuple[int, int]]) -> Ids:
    """The positions in ranges, in order."""
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in ranges])
