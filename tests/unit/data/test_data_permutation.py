"""The keyed order of samples: a bijection for every size and key, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.errors import DataError
from workers.data.permutation import MAX_SIZE, epoch_key, permute, sample_ids

MASK = 2**64 - 1
GOLDEN = {
    (1, 0): [0],
    (2, 1): [0, 1],
    (5, 7): [1, 4, 3, 2, 0],
    (10, 123456789): [1, 3, 6, 9, 0, 5, 4, 8],
    (1000, 2**64 - 1): [228, 60, 170, 522, 717, 147, 531, 298],
    (90795, 5): [56305, 32705, 84137, 41239, 80554, 22353, 3675, 17205],
    (2**62, 3): [
        1819646526041616880,
        457655455794566305,
        235814728812113806,
        1972768344223114902,
        203260930876474345,
        179692361472756351,
        4038169500038455262,
        3282383528869563629,
    ],
}


def reference(position: int, size: int, key: int) -> int:
    """The permutation once more, one position at a time, in plain Python."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    bits = max(1, (size - 1).bit_length())
    low_bits = (bits + 1) // 2
    value = position
    while True:
        high, low = value >> low_bits, value & ((1 << low_bits) - 1)
        for index in range(12):
            round_key = mix((key + (index + 1) * 0x9E3779B97F4A7C15) & MASK)
            if index % 2 == 0:
                high ^= mix((low + round_key) & MASK) & ((1 << (bits - low_bits)) - 1)
            else:
                low ^= mix((high + round_key) & MASK) & ((1 << low_bits) - 1)
        value = high << low_bits | low
        if value < size:
            return value


@pytest.mark.parametrize(("size", "key"), GOLDEN)
def test_golden_values_never_change(size: int, key: int) -> None:
    assert permute(np.arange(min(size, 8)), size=size, key=key).tolist() == GOLDEN[size, key]


def test_golden_order_of_a_run_never_changes() -> None:
    assert [epoch_key(*each) for each in [(0, 0), (0, 1), (1, 0), (2**63 - 1, 12345)]] == [
        0,
        16294208416658607535,
        8841707400507832957,
        11023091099544117595,
    ]
    assert sample_ids(np.arange(12), size=4, seed=0).tolist() == [2, 3, 1, 0, 1, 2, 0, 3, 3, 2, 1, 0]
    far = np.array([0, 1, 2, 90795, 10**12])
    assert sample_ids(far, size=90795, seed=42).tolist() == [54926, 32370, 44028, 63293, 50087]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, MASK))
def test_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, MAX_SIZE), key=st.integers(0, MASK))
def test_equals_the_plain_reference(data: st.DataObject, size: int, key: int) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    expected = [reference(position, size, key) for position in positions]
    assert permute(np.array(positions), size=size, key=key).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(size=st.integers(30, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_each_epoch_visits_every_sample_once_in_its_own_order(size: int, seed: int, epoch: int) -> None:
    one = sample_ids(np.arange(epoch * size, (epoch + 1) * size), size=size, seed=seed)
    two = sample_ids(np.arange((epoch + 1) * size, (epoch + 2) * size), size=size, seed=seed)
    assert np.array_equal(np.sort(one), np.arange(size)) and np.array_equal(np.sort(two), np.arange(size))
    assert not np.array_equal(one, two)
    across = np.arange(epoch * size + size // 2, (epoch + 1) * size + size // 2)
    assert np.array_equal(sample_ids(across, size=size, seed=seed), np.concatenate([one, two])[across - epoch * size])


def test_seeds_differ_and_shapes_are_kept() -> None:
    positions = np.arange(1000).reshape(10, 100)
    one = sample_ids(positions, size=1000, seed=1)
    assert one.shape == (10, 100) and one.dtype == np.int64
    assert (one != sample_ids(positions, size=1000, seed=2)).mean() > 0.99
    assert sample_ids(np.array([], dtype=np.int64), size=3, seed=0).shape == (0,)
    assert permute(np.int64(4), size=5, key=7).shape == ()


def test_outputs_are_even() -> None:
    """Where the first two positions go, over many keys: chi-square within six deviations of its mean."""
    for size in (8, 50):
        num_keys, counts = 4000, np.zeros((size, size))
        for key in range(num_keys):
            first, second = permute(np.arange(2), size=size, key=epoch_key(3, key))
            counts[first, second] += 1
        expected = num_keys / (size * (size - 1))
        off_diagonal = counts[~np.eye(size, dtype=bool)]
        chi_square = float(((off_diagonal - expected) ** 2 / expected).sum())
        freedom = off_diagonal.size - 1
        assert counts.trace() == 0
        assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    order = permute(np.arange(100_000), size=100_000, key=5)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert np.count_nonzero(np.diff(order) == 1) < 10


@pytest.mark.parametrize(("positions", "size"), [([0], 0), ([0], MAX_SIZE + 1), ([5], 5), ([-1], 5), ([0, 9], 5)])
def test_refuses_what_is_out_of_range(positions: list[int], size: int) -> None:
    with pytest.raises(DataError, match=r"outside|not between"):
        permute(np.array(positions), size=size, key=0)


def test_sample_ids_refuses_negative_positions_and_empty_splits() -> None:
    with pytest.raises(DataError, match="negative"):
        sample_ids(np.array([-1]), size=5, seed=0)
    with pytest.raises(DataError, match="number of samples"):
        sample_ids(np.array([0]), size=0, seed=0)
