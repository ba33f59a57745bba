"""Reading packs: wrong requests and damaged folders give one clear error each."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.errors import DataError
from workers.data.index import INDEX_FILE, check_sizes, count_samples, load_index, pack_digest
from workers.data.pack import pack
from workers.data.reader import PackReader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rows = [json.dumps({"text": f"document {i} says {i * i}\n" * 2}) for i in range(300)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    pack([folder / "a.jsonl"], folder / "pack", text_field="text", seq_len=16, val_fraction=0.2)
    return folder / "pack"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pack"))


def test_samples_overlap_by_one_token(made: Path) -> None:
    reader = PackReader(made)
    batch = reader.batch(np.array([0, 1, 0]))
    assert batch.shape == (3, 17) and batch[0, -1] == batch[1, 0] and np.array_equal(batch[0], batch[2])
    assert reader.tokenizer.decode(batch[0].tolist()).startswith("document ")
    assert reader.batch(np.array([], dtype=np.int64), "val").shape == (0, 17)


def test_last_sample_ends_inside_the_split(made: Path) -> None:
    reader = PackReader(made)
    for split in ("train", "val"):
        last = reader.num_samples(split) - 1
        assert reader.batch(np.array([last]), split).shape == (1, 17)
        for wrong in (last + 1, -1):
            with pytest.raises(DataError, match=rf"of {split} is outside 0\.\.{last}"):
                reader.batch(np.array([0, wrong]), split)


def test_count_samples() -> None:
    assert [count_samples(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_threads_may_share_a_reader(made: Path) -> None:
    reader = PackReader(made)
    ids = np.arange(reader.num_samples())
    expected = reader.batch(ids)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, expected) for each in pool.map(lambda _: reader.batch(ids), range(8)))


def test_not_a_pack(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    for path, cause in [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "file", "a file, not a pack"),
        (tmp_path, "not a pack"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ]:
        with pytest.raises(DataError, match=cause) as caught:
            PackReader(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda text: text[: len(text) // 2], "not a pack index"),
        (lambda text: "[" * 100_000, "not a pack index"),
        (lambda text: "\xff", "not a pack index|schema_version"),
        (lambda text: "[]", "schema_version is None"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version is 2"),
        (lambda text: text.replace('"seq_len": 16', '"seq_len": "16"'), "at seq_len"),
        (lambda text: text.replace('"seq_len": 16', '"seq_len": 8'), "num_samples does not follow"),
        (lambda text: text.replace('"vocab_size": 256', '"vocab_size": 257'), "digest does not fit"),
        (lambda text: text.replace("train-00000.arrow", "../train-00000.arrow"), "at splits.train.shards.0.file"),
        (lambda text: text.replace('"val":', '"valid":'), "at splits.valid"),
        (lambda text: text.replace('"seq_len"', '"more": 1, "seq_len"'), "at more"),
    ],
)
def test_damaged_index(copy: Path, edit: object, cause: str) -> None:
    file = copy / INDEX_FILE
    file.write_text(edit(file.read_text()), encoding="latin-1")
    with pytest.raises(DataError, match=cause) as caught:
        load_index(copy)
    assert str(file) in str(caught.value) and "atoll data pack" in str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 7, 1000, None])
def test_truncated_shard_is_found_when_opened(copy: Path, num_bytes: int | None) -> None:
    shard = copy / "val-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) - 1 if num_bytes is None else num_bytes])
    with pytest.raises(DataError, match=r"val-00000\.arrow: shard has \d+ bytes, the index says"):
        PackReader(copy)


def test_missing_shard_is_found_when_opened(copy: Path) -> None:
    (copy / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"train-00000\.arrow: shard cannot be read \(No such file"):
        check_sizes(copy, load_index(copy))


def test_a_changed_token_is_found_by_verify(copy: Path) -> None:
    shard = copy / "train-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"document 7 says 49", b"document 7 says 48", 1))
    reader = PackReader(copy)
    with pytest.raises(DataError, match=r"train-00000\.arrow: shard is damaged: its tokens have digest"):
        reader.verify()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_harmless_or_found(
    made: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = (made / "val-00000.arrow").read_bytes()
    ends = st.integers(0, 600) | st.integers(len(original) - 600, len(original) - 1)
    position = data.draw(ends | st.integers(0, len(original) - 1))
    flipped = bytearray(original)
    flipped[position] ^= data.draw(st.integers(1, 255))
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("flip") / "pack"))
    (folder / "val-00000.arrow").write_bytes(flipped)
    try:
        reader = PackReader(folder)
        reader.verify()
    except DataError as error:
        assert "val-00000.arrow: shard is damaged" in str(error)
    else:
        ids = np.arange(reader.num_samples("val"))
        assert np.array_equal(reader.batch(ids, "val"), PackReader(made).batch(ids, "val"))


def replace_shard(folder: Path, table: pa.Table) -> None:
    """Put another Arrow file in place of the val shard, with its size in the index."""
    file = folder / "val-00000.arrow"
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["splits"]["val"]["shards"][0]["num_bytes"] = file.stat().st_size
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_foreign_arrow_files_are_refused(copy: Path) -> None:
    num_tokens = load_index(copy).splits["val"].num_tokens
    required = pa.schema([pa.field("tokens", pa.uint8(), nullable=False)])
    for table, cause in [
        (pa.table({"tokens": pa.array([1] * num_tokens, pa.uint8())}), "not one column 'tokens' of uint8"),
        (pa.table({"words": pa.array([1] * num_tokens, pa.uint8())}), "not one column 'tokens' of uint8"),
        (pa.table({"tokens": pa.array([1] * num_tokens, pa.int64())}), "not one column 'tokens' of uint8"),
        (pa.table([pa.array([1] * (num_tokens - 1), pa.uint8())], schema=required), "the index says"),
    ]:
        replace_shard(copy, table)
        with pytest.raises(DataError, match=cause):
            PackReader(copy)


def test_tokens_outside_the_vocabulary_are_found_by_verify(copy: Path) -> None:
    text = json.loads((copy / INDEX_FILE).read_text())
    text["vocab_size"] = 200
    text["digest"] = pack_digest(text)
    (copy / INDEX_FILE).write_text(json.dumps(text))
    with pytest.raises(DataError, match=r"token 255 is outside the vocabulary 0\.\.199"):
        PackReader(copy).verify()


def test_a_pack_keeps_its_tokenizer(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "</s>": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="b"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    rows = "\n".join(json.dumps({"text": "a " * (i + 1)}) for i in range(60))
    (tmp_path / "a.jsonl").write_text(rows)
    words, out = str(tmp_path / "words.json"), tmp_path / "pack"
    pack([tmp_path / "a.jsonl"], out, tokenizer=words, text_field="text", seq_len=4, val_fraction=0.3)
    assert PackReader(out).tokenizer.decode([0, 1, 2]) == "a b"

    file = out / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"c"'))
    with pytest.raises(DataError, match=r"tokenizer\.json: has digest .* restore"):
        PackReader(out).verify()
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: the pack's tokenizer is missing"):
        _ = PackReader(out).tokenizer
