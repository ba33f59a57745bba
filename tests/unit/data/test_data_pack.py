"""Packing: equal to a plain reference, deterministic, whole or not at all, and small in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data import pack as pack_module
from workers.data import shards, sources
from workers.data.errors import DataError
from workers.data.index import SPLITS, SplitName, load_index
from workers.data.pack import pack
from workers.data.reader import PackReader
from workers.data.sources import cut_blocks

ROOT = Path(__file__).resolve().parents[3]


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def is_val(block: bytes, val_fraction: float) -> bool:
    return int.from_bytes(blake3(block).digest(length=8), "little") / 2**64 < val_fraction


def reference(texts: Sequence[str], val_fraction: float) -> dict[str, list[int]]:
    """The two streams of byte tokens, made one document at a time with lists."""
    streams: dict[str, list[int]] = {"train": [], "val": []}
    for text in texts:
        last = None
        for block in cut_blocks(text.encode()):
            side = "val" if is_val(block, val_fraction) else "train"
            if last not in (None, side):
                streams[last].append(255)
            streams[side] += block
            last = side
        if last is not None:
            streams[last].append(255)
    return streams


def assert_reads_as(reader: PackReader, streams: dict[str, list[int]]) -> None:
    seq_len = reader.index.seq_len
    for split in SPLITS:
        tokens = np.array(streams[split])
        num_samples = max(0, (len(tokens) - 1) // seq_len)
        assert reader.index.splits[split].num_tokens == len(tokens)
        assert reader.num_samples(split) == num_samples
        samples = reader.batch(np.arange(num_samples), split)
        expected = [tokens[i * seq_len : i * seq_len + seq_len + 1] for i in range(num_samples)]
        assert samples.dtype == np.int64 and np.array_equal(samples, np.stack(expected))


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("ab\né🙂", max_size=60), min_size=8, max_size=30),
    seq_len=st.integers(2, 9),
    segment=st.integers(1, 40),
    shard=st.integers(1, 100),
    block=st.integers(4, 40),
    batch=st.integers(1, 100),
)
def test_round_trip_equals_the_plain_reference(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    seq_len: int,
    segment: int,
    shard: int,
    block: int,
    batch: int,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MAX_BLOCK_BYTES", block)
        patch.setattr(shards, "SEGMENT_TOKENS", segment)
        patch.setattr(shards, "SHARD_TOKENS", shard)
        patch.setattr(pack_module, "_BATCH_BYTES", batch)
        streams = reference(texts, 0.4)
        source = write_rows(folder / "a.jsonl", texts)
        try:
            index = pack([source], folder / "out", text_field="text", seq_len=seq_len, val_fraction=0.4)
        except DataError as error:
            assert "would have no sample" in str(error) or "no text" in str(error)
            assert min(map(len, streams.values())) <= seq_len
            assert sorted(each.name for each in folder.iterdir()) == ["a.jsonl"]
            return
    reader = PackReader(folder / "out")
    assert_reads_as(reader, streams)
    reader.verify()
    assert index == reader.index == load_index(folder / "out")
    assert index.num_documents == sum(1 for text in texts if text)


def tokens_of(reader: PackReader, split: SplitName) -> bytes:
    """Every token of a part, one byte each."""
    stream = reader._streams[split]
    return b"".join(bytes(segment) for shard in reader.index.splits[split].shards for segment in stream._load(shard))


def test_json_tokenizer_round_trip(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 299}, unk_token="b"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    texts = ["a b " * (1 + i % 7) + "a " * (i % 5) for i in range(200)]
    write_rows(tmp_path / "a.jsonl", texts)
    index = pack(
        [tmp_path / "a.jsonl"],
        tmp_path / "out",
        tokenizer=str(tmp_path / "words.json"),
        text_field="text",
        seq_len=4,
        val_fraction=0.3,
    )
    assert (index.vocab_size, index.token_type, index.tokenizer.separator_id) == (300, "uint16", 299)
    streams: dict[str, list[int]] = {"train": [], "val": []}
    for text in texts:
        ids = [0 if word == "a" else 1 for word in text.split()]
        streams["val" if is_val(text.encode(), 0.3) else "train"] += [*ids, 299]
    reader = PackReader(tmp_path / "out")
    assert_reads_as(reader, streams)
    reader.verify()
    assert reader.tokenizer.encode("a b") == [0, 1]


def test_the_split_is_a_property_of_the_text_alone(tmp_path: Path) -> None:
    texts = [f"document {i}\n" * 3 for i in range(300)]

    def parts(name: str, order: Sequence[str]) -> dict[str, set[str]]:
        write_rows(tmp_path / f"{name}.jsonl", order)
        pack([tmp_path / f"{name}.jsonl"], tmp_path / name, text_field="text", seq_len=8, val_fraction=0.2)
        reader = PackReader(tmp_path / name)
        return {split: set(tokens_of(reader, split).split(b"\xff")[:-1]) for split in SPLITS}

    one = parts("one", texts)
    assert parts("again", texts + texts[:50]) == one == parts("reversed", texts[::-1])
    assert not one["train"] & one["val"] and len(one["train"] | one["val"]) == 300
    assert 30 <= len(one["val"]) <= 90
    grown = parts("grown", [f"another {i}\n" * 3 for i in range(100)] + texts)
    assert one["val"] <= grown["val"] and one["train"] <= grown["train"]


def test_the_same_text_gives_the_same_digest_and_other_text_another(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(100)]
    settings = {"text_field": "text", "seq_len": 8, "val_fraction": 0.2}
    one = pack([write_rows(tmp_path / "a.jsonl", texts)], tmp_path / "one", **settings)
    two = pack([write_rows(tmp_path / "b.jsonl", texts)], tmp_path / "two", **settings)
    other = pack([write_rows(tmp_path / "c.jsonl", [*texts, "x"])], tmp_path / "other", **settings)
    longer = pack([tmp_path / "a.jsonl"], tmp_path / "longer", **(settings | {"seq_len": 9}))
    assert one.digest == two.digest and len({one.digest, other.digest, longer.digest}) == 3
    assert (tmp_path / "one/train-00000.arrow").read_bytes() == (tmp_path / "two/train-00000.arrow").read_bytes()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"seq_len": 1}, "seq_len 1 is not between"),
        ({"seq_len": 1 << 21}, "seq_len 2097152 is not between"),
        ({"seq_len": 10_000}, r"the \w+ part would have no sample: .* smaller seq_len"),
        ({"val_fraction": 0.0}, r"val_fraction 0\.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, r"val_fraction 1\.0"),
        ({"val_fraction": float("nan")}, "val_fraction nan"),
        ({"val_fraction": 1e-9}, r"the val part would have no sample: 0 of 50 blocks .* larger val_fraction"),
        ({"val_fraction": 1 - 1e-9}, r"the train part would have no sample: 0 of 50 blocks .* smaller val_fraction"),
        ({"tokenizer": "nothing.json"}, "tokenizer 'nothing.json'"),
        ({"text_field": "body"}, "no field 'body'"),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path: Path, settings: dict[str, object], cause: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", [f"document {i}" for i in range(50)])
    everything = {"text_field": "text", "seq_len": 8, "val_fraction": 0.2} | settings
    with pytest.raises(DataError, match=cause):
        pack([source], tmp_path / "sub" / "out", **everything)
    assert not list(tmp_path.rglob("*out*"))


def test_empty_sources_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no text"):
        pack([tmp_path / "a.txt"], tmp_path / "out")


def test_output_replaces_a_pack_and_nothing_else(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [f"document {i}" for i in range(50)])
    settings = {"text_field": "text", "val_fraction": 0.3}
    out = tmp_path / "deep" / "out"
    first = pack([source], out, seq_len=4, **settings)
    mapped = PackReader(out)
    sample = mapped.batch(np.array([0]))
    second = pack([source], out, seq_len=8, **settings)
    assert load_index(out) == second != first
    assert np.array_equal(mapped.batch(np.array([0])), sample)
    assert [each.name for each in out.parent.iterdir()] == ["out"]

    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"beside a pack it holds 'notes\.txt'"):
        pack([source], out, seq_len=4, **settings)
    assert load_index(out) == second and (out / "notes.txt").read_text() == "mine"

    with pytest.raises(DataError, match="not empty and not a pack"):
        pack([source], tmp_path, seq_len=4, **settings)
    with pytest.raises(DataError, match="a file is there"):
        pack([source], source, seq_len=4, **settings)
    with pytest.raises(DataError, match="cannot be made"):
        pack([source], source / "out", seq_len=4, **settings)
    (tmp_path / "empty").mkdir()
    assert pack([source], tmp_path / "empty", seq_len=4, **settings) == first
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "empty")
    assert pack([source], link, seq_len=8, **settings) == second and link.is_symlink()


def test_a_stop_in_the_middle_leaves_the_old_pack_and_no_rubbish(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [f"document {i}" * 50_000 for i in range(5)])
    small = write_rows(tmp_path / "b.jsonl", [f"document {i}" for i in range(50)])
    settings = {"text_field": "text", "seq_len": 8, "val_fraction": 0.3}
    index = pack([small], tmp_path / "out", **settings)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "out", on_progress=stop, **settings)
    assert load_index(tmp_path / "out") == index
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]


def test_a_failed_rename_puts_the_old_pack_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "a.jsonl", [f"document {i}" for i in range(50)])
    settings = {"text_field": "text", "val_fraction": 0.3}
    index = pack([source], tmp_path / "out", seq_len=8, **settings)
    rename = os.rename

    def fail(old: Path, new: Path) -> None:
        if ".new-" in str(old):
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(pack_module.os, "rename", fail)
    with pytest.raises(DataError, match="cannot be put in place"):
        pack([source], tmp_path / "out", seq_len=4, **settings)
    assert load_index(tmp_path / "out") == index
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "out"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from workers.data.errors import DataError
from workers.data.pack import pack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
try:
    pack([Path(sys.argv[1])], Path(sys.argv[2]), seq_len=8, val_fraction=0.3)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(400_000)))
    child = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path / "a.txt"), str(tmp_path / "out")]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert "cannot be written (File too large); free space" in done.stdout, done.stderr
    assert done.returncode == 0 and not done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_progress_grows_to_the_total(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(200_000)))
    seen: list[tuple[int, int]] = []
    pack([tmp_path], tmp_path / "out", seq_len=8, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in tmp_path.glob("*.txt"))
    assert len(seen) > 3 and seen[-1] == (total, total) and {each[1] for each in seen} == {total}
    assert seen == sorted(seen)


def test_200_mb_pack_in_less_than_250_mb(tmp_path: Path) -> None:
    benchmark = [sys.executable, str(ROOT / "benchmarks/pack_memory.py"), "--folder", str(tmp_path)]
    done = subprocess.run(
        [*benchmark, "--megabytes", "200", "--limit-mb", "250"], capture_output=True, text=True, timeout=55
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["num_tokens"] >= 200_000_000 and 0 < result["peak_above_start_mb"] < 250
