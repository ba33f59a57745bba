"""The embedded corpus: made once, race-safe, repaired when damaged."""

from __future__ import annotations

import logging
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from workers.data import corpus
from workers.data.corpus import corpus_digest, default_cache_dir, resolve_corpus
from workers.data.errors import DataError
from workers.data.index import load_index
from workers.data.reader import PackReader

ROOT = Path(__file__).resolve().parents[3]
RESOLVE = """
import sys
from pathlib import Path
from workers.data.corpus import resolve_corpus
print("ready", flush=True)
sys.stdin.readline()
print(resolve_corpus("stdlib", seq_len=64, cache_dir=Path(sys.argv[1])))
assert "torch" not in sys.modules
"""


def test_two_processes_at_once_get_one_whole_pack(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RESOLVE, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=50)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outputs[0] == outputs[1]
    assert [str(each) for each in (tmp_path / "corpora").iterdir()] == [outputs[0]]

    reader = PackReader(Path(outputs[0]))
    reader.verify()
    assert corpus_digest("stdlib") in outputs[0]
    index = reader.index
    assert (index.seq_len, index.vocab_size, index.token_type) == (64, 256, "uint8")
    assert 5_000_000 < index.splits["train"].num_tokens < 40_000_000
    assert 0.02 < index.splits["val"].num_tokens / index.splits["train"].num_tokens < 0.1
    text = reader.tokenizer.decode(reader.batch(np.arange(200)).reshape(-1).tolist())
    assert "import" in text


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "library"
    for i in range(120):
        path = root / ("json" if i % 2 else "") / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"value_{i} = {i}\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_only_sources_count(small_library: Path) -> None:
    before = corpus_digest("stdlib")
    for name in ["test/a.py", "json/tests/a.py", "site-packages/a.py", "__pycache__/a.py", "config-3-x/a.py"]:
        (small_library / name).parent.mkdir(exist_ok=True, parents=True)
        (small_library / name).write_text("left_out = 1\n")
    (small_library / "_sysconfigdata_linux.py").write_text("left_out = 1\n")
    (small_library / "data.txt").write_text("left out")
    (small_library / "latin.py").write_bytes(b"# \xe9\n")
    assert corpus_digest("stdlib") == before
    (small_library / "json/module_1.py").rename(small_library / "json/renamed.py")
    assert corpus_digest("stdlib") != before


def test_made_once_and_again_for_other_lengths_and_contents(small_library: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one = resolve_corpus("stdlib", seq_len=8, cache_dir=cache)
    stamp = (one / "index.json").stat().st_mtime_ns
    assert resolve_corpus("stdlib", seq_len=8, cache_dir=cache) == one
    assert (one / "index.json").stat().st_mtime_ns == stamp
    longer = resolve_corpus("stdlib", seq_len=16, cache_dir=cache)
    (small_library / "more.py").write_text("more = 1\n" * 100)
    other = resolve_corpus("stdlib", seq_len=8, cache_dir=cache)
    assert len({one, longer, other}) == 3 and load_index(other).digest != load_index(one).digest


def test_a_damaged_pack_is_made_again_and_said_so(
    small_library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    made = resolve_corpus("stdlib", seq_len=8, cache_dir=cache)
    (made / "train-00000.arrow").write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        assert resolve_corpus("stdlib", seq_len=8, cache_dir=cache) == made
    assert "damaged and made again" in caplog.text and "train-00000.arrow" in caplog.text
    PackReader(made).verify()
    assert [each.name for each in (cache / "corpora").iterdir()] == [made.name]


def test_the_loser_of_a_race_uses_the_winners_pack(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pack, cache = corpus.pack, tmp_path / "cache"

    def slow_pack(*args: object, **settings: object) -> object:
        index = real_pack(*args, **settings)
        monkeypatch.setattr(corpus, "pack", real_pack)
        resolve_corpus("stdlib", seq_len=8, cache_dir=cache)
        return index

    monkeypatch.setattr(corpus, "pack", slow_pack)
    made = resolve_corpus("stdlib", seq_len=8, cache_dir=cache)
    PackReader(made).verify()
    assert [each.name for each in (cache / "corpora").iterdir()] == [made.name]


def test_errors_name_place_and_remedy(tmp_path: Path, small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.corpus 'wikipedia': no such corpus; there is 'stdlib'"):
        resolve_corpus("wikipedia", seq_len=8, cache_dir=tmp_path)
    with pytest.raises(DataError, match="would have no sample"):
        resolve_corpus("stdlib", seq_len=1 << 20, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"no place for the embedded corpus .*XDG_CACHE_HOME"):
        resolve_corpus("stdlib", seq_len=8, cache_dir=tmp_path / "file")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no sources of its standard library"):
        corpus_digest("stdlib")


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_library: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "atoll"
    assert resolve_corpus("stdlib", seq_len=8).parent == tmp_path / "xdg" / "atoll" / "corpora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "atoll"
