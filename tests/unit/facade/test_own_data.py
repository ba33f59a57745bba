"""Datasets of one's own: what is taken for one, and what a batch of it is."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from workers.loop_checks import LoopError
from workers.samples import DatasetSamples, Ids, cut, evenly_spread, num_samples_of, to_device

CPU = torch.device("cpu")
IDS: Ids = np.array([3, 0, 3], dtype=np.int64)
ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


def batch_of(dataset: Any, **arguments: Any) -> Any:
    size = num_samples_of(dataset)
    return DatasetSamples(dataset, None, collate=arguments.get("collate"), num_samples=size, device=CPU).batch(IDS)


class Squares:
    """A map-style dataset."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> tuple[int, float]:
        return number, float(number * number)


def test_arrays_and_tensors_give_their_rows() -> None:
    wanted = torch.from_numpy(ROWS[IDS])
    assert torch.equal(batch_of(ROWS), wanted)
    assert torch.equal(batch_of(torch.from_numpy(ROWS)), wanted)
    pixels, labels = batch_of((ROWS, torch.arange(6)))
    assert torch.equal(pixels, wanted) and labels.tolist() == [3, 0, 3]
    table = batch_of({"x": ROWS, "y": np.arange(6)})
    assert torch.equal(table["x"], wanted) and table["y"].tolist() == [3, 0, 3]


def test_a_read_only_memory_map_is_an_array_too(tmp_path: Any) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    assert torch.equal(batch_of(np.load(tmp_path / "rows.npy", mmap_mode="r")), torch.from_numpy(ROWS[IDS]))


def test_map_style_datasets_are_collated() -> None:
    numbers, squares = batch_of(Squares())
    assert numbers.tolist() == [3, 0, 3] and squares.tolist() == [9.0, 0.0, 9.0]
    assert batch_of(Squares(), collate=lambda samples: [s[0] for s in samples]) == [3, 0, 3]
    (rows,) = batch_of(TensorDataset(torch.from_numpy(ROWS)))
    assert torch.equal(rows, torch.from_numpy(ROWS[IDS]))
    assert batch_of(list(range(6))).tolist() == [3, 0, 3]


def test_what_is_no_dataset() -> None:
    for wrong in ("text", {"a": "b"}, {1, 2}, 7, np.float32(3)):
        with pytest.raises(LoopError, match="give arrays or tensors"):
            num_samples_of(wrong)


def test_tensors_travel_inside_of_structures() -> None:
    Pair = namedtuple("Pair", "a b")
    inner = {"x": [torch.zeros(1), "text"], "p": Pair(torch.ones(1), 2)}
    moved = to_device(inner, torch.device("meta"))
    assert moved["x"][0].device.type == "meta" and moved["x"][1] == "text"
    assert isinstance(moved["p"], Pair) and moved["p"].a.device.type == "meta" and moved["p"].b == 2


@pytest.mark.parametrize(("size", "count"), [(10, 4), (3, 8), (1, 1), (7, 7)])
def test_the_evaluated_samples_are_spread_and_cut(size: int, count: int) -> None:
    ids = evenly_spread(size, count)
    assert len(set(ids.tolist())) == min(size, count) and ids.min() == 0 and ids.max() < size
    pieces = list(cut(ids, 3))
    assert np.array_equal(np.concatenate(pieces), ids) and max(map(len, pieces)) <= 3
