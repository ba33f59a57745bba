"""The store: no copies, aliases, exact prefixes, byte accounting, and waiting readers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.transport.support import WrappedStore, wait_for
from workers.digest import digest
from workers.store import BlobStore, content_key


def test_keys_are_dropped_by_name_and_nothing_below_them() -> None:
    store = BlobStore()
    for key in ("a", "a/1", "b"):
        store.put(key, b"abc")
    assert store.discard_keys(["a", "none"]) == 3
    assert store.keys() == ["a/1", "b"]


def test_keeps_the_buffer_itself() -> None:
    store = BlobStore()
    tensor = torch.zeros(1000)
    store.put("piece/0", tensor.numpy())
    tensor[0] = 1.0
    view = store.get("piece/0")
    assert view is not None and view.readonly and view.nbytes == 4000
    assert np.frombuffer(view, dtype=np.float32)[0] == 1.0


def test_put_returns_the_digest_and_trusts_a_given_one() -> None:
    store = BlobStore()
    assert store.put("a", b"abc") == digest(b"abc")
    assert store.put("b", b"abc", digest_hex="00" * 16) == "00" * 16
    blob = store.find("b")
    assert blob is not None and blob.digest == "00" * 16


def test_missing_key_is_none_and_an_empty_blob_is_not() -> None:
    store = BlobStore()
    store.put("empty", b"")
    assert store.get("nothing") is None
    assert store.get("empty") == b""
    assert "empty" in store and "nothing" not in store and len(store) == 1


def test_refuses_an_empty_key_and_strided_memory() -> None:
    with pytest.raises(ValueError, match="key"):
        BlobStore().put("", b"x")
    with pytest.raises(ValueError, match="contiguous"):
        BlobStore().put("a", np.zeros((4, 4))[:, ::2])


def test_discard_takes_whole_components_only() -> None:
    store = BlobStore()
    for key in ("piece/0/island-1/7", "piece/0/island-1", "piece/0/island-10/7", "piece/1/x"):
        store.put(key, b"1234")
    assert store.discard("piece/0/island-1") == 8
    assert store.keys() == ["piece/0/island-10/7", "piece/1/x"]
    assert store.discard("piece/0/") == 4
    assert store.discard("piece/0") == 0
    assert store.num_bytes == 4
    assert store.discard("") == 4 and len(store) == 0


def test_second_put_replaces_and_old_readers_keep_theirs() -> None:
    store = BlobStore()
    store.put("a", b"old")
    old = store.get("a")
    store.put("a", b"newer")
    assert old == b"old" and store.get("a") == b"newer" and store.num_bytes == 5


def test_alias_lives_as_long_as_one_holder() -> None:
    store = BlobStore()
    alias = content_key(digest(b"same"))
    store.put("result/1", b"same", content_key=alias)
    store.put("result/2", b"same", content_key=alias)
    assert store.get(alias) == b"same" and store.num_bytes == 8 and store.keys() == ["result/1", "result/2"]
    store.discard("result/1")
    assert store.get(alias) == b"same"
    store.discard("result")
    assert store.get(alias) is None and alias not in store


def test_names_of_given_contents_are_dropped_and_others_kept() -> None:
    store = BlobStore()
    first = store.put("result/0/roster/0", b"one")
    store.put("result/0/roster/1", b"two")
    store.put("result/1/roster/0", b"one")
    store.put("content/one", b"one")
    store.discard_content("result/0", {first})
    assert store.keys() == ["result/0/roster/1", "result/1/roster/0", "content/one"]


def test_alias_alone_can_be_discarded_or_replaced() -> None:
    store = BlobStore()
    store.put("a", b"x", content_key="blob/1")
    assert store.discard("blob/1") == 0
    assert store.get("blob/1") is None and store.get("a") == b"x"
    store.put("a", b"y", content_key="blob/2")
    store.put("a", b"z", content_key="blob/3")
    assert store.get("blob/2") is None and store.get("blob/3") == b"z"


def test_get_waits_until_the_key_is_put() -> None:
    store = BlobStore()
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.append(store.get("late", wait_s=10)))
    reader.start()
    store.put("other", b"no")
    store.put("late", b"yes")
    reader.join(10)
    assert got == [b"yes"]


def test_get_gives_up_after_its_time() -> None:
    assert BlobStore().get("never", wait_s=0.01) is None


def test_interrupt_makes_waiters_look_at_stop() -> None:
    store = BlobStore()
    watched = WrappedStore(store)
    stop = threading.Event()
    result: list[bool] = []
    waiter = threading.Thread(
        target=lambda: result.append(watched.wait_any(["never"], timeout_s=30, stop=stop.is_set)), daemon=True
    )
    waiter.start()
    wait_for(watched.waiting.is_set, "the waiter")
    stop.set()
    store.interrupt()
    waiter.join(10)
    assert result == [False]


KEYS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map("/".join)
ALIASES = st.none() | st.sampled_from(["blob/1", "blob/2"])


@given(st.lists(st.tuples(st.sampled_from(["put", "discard"]), KEYS, st.integers(0, 5), ALIASES), max_size=30))
def test_bytes_and_aliases_agree_with_a_naive_model(steps: list[tuple[str, str, int, str | None]]) -> None:
    store = BlobStore()
    model: dict[str, tuple[bytes, str | None]] = {}
    for action, key, size, alias in steps:
        if action == "put":
            model.pop(key, None)
            model[key] = (bytes([size]) * size, alias)
            store.put(key, model[key][0], content_key=alias)
        else:
            store.discard(key)
            model = {k: v for k, v in model.items() if k != key and not k.startswith(key + "/")}
        assert store.num_bytes == sum(len(data) for data, _ in model.values())
        assert store.keys() == list(model)
        for name in ("blob/1", "blob/2"):
            held = [data for data, alias_of in model.values() if alias_of == name]
            view = store.get(name)
            assert (view is None) == (not held) and (view is None or bytes(view) in held)
