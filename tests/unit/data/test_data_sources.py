"""Text out of files: the cuts, the formats, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data import sources
from workers.data.errors import DataError
from workers.data.sources import MAX_BLOCK_BYTES, cut_blocks, find_sources, read_blocks


def documents(path: Path, *, field: str | None = "text", column: str | None = "text") -> list[list[bytes]]:
    found: list[list[bytes]] = []
    for file in find_sources([path], text_field=field, text_column=column):
        for block in read_blocks(file):
            if block.starts_document:
                found.append([])
            found[-1].append(block.data)
    return found


def plain_cuts(data: bytes, limit: int) -> list[bytes]:
    """The rule in plain words: the longest run of whole lines that fits, else of whole characters that fit."""
    cuts = []
    while len(data) > limit:
        head = data[:limit]
        end = head.rfind(b"\n") + 1
        if not end:
            end = max(n for n in range(limit + 1) if data[:n].decode(errors="ignore").encode() == data[:n])
        cuts.append(data[:end])
        data = data[end:]
    return cuts + [data] * bool(data)


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("\nab\ré€🙂", max_size=200),
    limit=st.integers(4, 30),
    read_bytes=st.integers(1, 50),
)
def test_cuts_follow_the_rule_whatever_the_reads(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int, read_bytes: int
) -> None:
    data = text.encode()
    path = tmp_path_factory.mktemp("cuts") / "a.txt"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MAX_BLOCK_BYTES", limit)
        patch.setattr(sources, "_READ_BYTES", read_bytes)
        expected = plain_cuts(data, limit)
        assert list(cut_blocks(data)) == expected
        assert documents(path) == ([expected] if expected else [])
    assert b"".join(expected) == data and all(len(cut) <= limit for cut in expected)


def test_a_long_document_is_cut_at_line_ends(tmp_path: Path) -> None:
    data = b"".join(b"line %d\n" % i for i in range(40_000))
    (tmp_path / "a.md").write_bytes(data)
    (blocks,) = documents(tmp_path)
    assert len(blocks) == -(-len(data) // MAX_BLOCK_BYTES) and b"".join(blocks) == data
    assert all(len(block) <= MAX_BLOCK_BYTES and block.endswith(b"\n") for block in blocks)


def test_every_format_gives_the_same_text(tmp_path: Path) -> None:
    texts = ["one\n", "zwei é\n", "x" * (MAX_BLOCK_BYTES + 5), "", None, "last"]
    wanted = [list(cut_blocks(text.encode())) for text in texts if text]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text, "n": 1}) for text in texts))
    assert documents(tmp_path / "a.jsonl") == wanted
    for number, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"n": list(range(6)), "text": pa.array(texts).cast(kind)}), file)
        assert documents(file) == wanted
    pq.write_table(pa.table({"n": list(range(6)), "a.b": pa.array(texts)}), tmp_path / "dot.parquet")
    assert documents(tmp_path / "dot.parquet", column="a.b") == wanted


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n')
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert documents(tmp_path) == [[b"hello"], [b"hello"]]


def test_folders_are_walked_in_order_without_what_is_hidden_or_foreign(tmp_path: Path) -> None:
    for name in ["b/z.txt", "b/a.py", "a.md", "c.TXT", ".hidden.txt", ".git/x.txt", "image.png", "b.txt/inner.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert documents(tmp_path) == [[b"a.md"], [b"b.txt/inner.txt"], [b"b/a.py"], [b"b/z.txt"], [b"c.TXT"]]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    found = find_sources([tmp_path / "a.txt", tmp_path], text_field=None, text_column=None)
    assert [file.path.name for file in found] == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b"ok\n" * 9 + b"\xff\xfeh\x00i\x00", "not UTF-8 at byte 27"),
        ("a.txt", "é".encode("latin-1"), "not UTF-8 at byte 0"),
        ("a.txt", b"x" * 70_000 + b"\x80" * 10, "not UTF-8 at byte 70000"),
        ("a.txt", b"\x80" * 70_000, "not UTF-8 at byte 0"),
        ("a.txt", b"\xed\xa0\x80", "not UTF-8 at byte 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8 at line 2"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3 is not JSON"),
        ("a.jsonl", b'[{"text": "a"}]\n', "line 1 is not a JSON object but list"),
        ("a.jsonl", b'{"txt": "a"}\n', r"line 1 has no field 'text'; did you mean 'txt'\?"),
        ("a.jsonl", b"{}\n", "line 1 has no field 'text'; it has none"),
        ("a.jsonl", b'{"text": 3}\n', "field 'text' is not text but int"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "lone surrogate at character 1"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "line 1 is not usable JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not usable JSON"),
        ("a.parquet", b"PAR1 nothing of the kind PAR1", "not a readable parquet file"),
        ("a.parquet", b"", "not a readable parquet file"),
    ],
)
def test_bad_content_is_one_clear_error(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        documents(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "x" * 2000}))
    with pytest.raises(DataError, match="line 2 is longer"):
        documents(tmp_path)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"id": [1], "content": ["a"], "raw": pa.array([b"a"]), "list": pa.array([["a"]])}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"no column 'contents'; did you mean 'content'\? it has 'id', 'content'"):
        documents(path, column="contents")
    for column, kind in [("id", "int64"), ("raw", "binary"), ("list", "list")]:
        with pytest.raises(DataError, match=f"column '{column}' is not text but {kind}"):
            documents(path, column=column)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, path)
    with pytest.raises(DataError, match="more than one column 'text'"):
        documents(path)


def test_parquet_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: (not UTF-8 at row 2|column 'text' cannot be read)"):
        documents(tmp_path)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(200)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[300:30_000] = bytes(29_700)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: (column 'text' )?cannot be read"):
        documents(path)


def test_text_field_and_column_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="--text-field"):
        documents(tmp_path, field=None)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "0.parquet")
    with pytest.raises(DataError, match="--text-column"):
        documents(tmp_path, column=None)


def test_paths_that_cannot_be_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, cause in [
        ("missing.txt", "no such file or folder"),
        ("empty", "folder holds no file that ends in .txt"),
        ("a.docx", "suffix '.docx' is not supported"),
        ("pipe.txt", "not a regular file"),
        ("x" * 300 + ".txt", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=cause):
            documents(tmp_path / name)
    with pytest.raises(DataError, match="no source"):
        find_sources([], text_field=None, text_column=None)
