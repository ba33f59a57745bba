"""`atoll data`: text to packs of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from orchestrator.cli.options import json_option

if TYPE_CHECKING:
    from workers.data.index import PackIndex


@click.group()
def data() -> None:
    """Prepare training data."""


@data.command("pack")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to make; an existing pack is replaced."
)
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    metavar="bytes|FILE",
    help="Bytes, or a tokenizer.json of your own.",
)
@click.option("--text-field", metavar="NAME", help="Field of .jsonl rows that holds the text.")
@click.option("--text-column", metavar="NAME", help="Column of .parquet files that holds the text.")
@click.option("--seq-len", default=128, show_default=True, type=int, help="Tokens in one training sample.")
@click.option(
    "--val-fraction", default=0.05, show_default=True, type=float, help="Share of the text kept for validation."
)
@click.option(
    "--scope",
    default="run",
    show_default=True,
    type=click.Choice(["run", "island"]),
    help="island: the pack never leaves this machine, and only the island here trains on it.",
)
@json_option
def pack_command(
    sources: tuple[Path, ...],
    out: Path,
    tokenizer: str,
    text_field: str | None,
    text_column: str | None,
    seq_len: int,
    val_fraction: float,
    scope: Literal["run", "island"],
    as_json: bool,
) -> None:
    """Turn text into a pack: token shards with an index, ready to train on.

    SOURCE is a .txt, .md, .py, .jsonl or .parquet file with UTF-8 text, or a folder of them. Memory stays small
    whatever the size.
    """
    from workers.data.pack import pack

    before, notes = _digest_at(out), list[str]()
    with _progress() as on_progress:
        index = pack(
            sources,
            out,
            tokenizer=tokenizer,
            text_field=text_field,
            text_column=text_column,
            seq_len=seq_len,
            val_fraction=val_fraction,
            scope=scope,
            on_progress=on_progress,
            on_note=notes.append,
        )
    if as_json:
        click.echo(_json(index, out, former=before if before != index.digest else None, notes=notes))
        return
    click.echo(_summary(index, out))
    for note in notes:
        click.echo(f"warning: {note}", err=True)
    if before not in (None, index.digest):
        click.echo(f"it took the place of the pack {before}", err=True)


def _json(index: PackIndex, pack: Path, *, former: str | None = None, notes: Sequence[str] = ()) -> str:
    from orchestrator.answers import Packed, SplitOfPack

    return Packed(
        pack=str(pack),
        digest=index.digest,
        took_the_place_of=former,
        seq_len=index.seq_len,
        vocab_size=index.vocab_size,
        num_documents=index.num_documents,
        splits={
            name: SplitOfPack(num_tokens=split.num_tokens, num_samples=split.num_samples)
            for name, split in index.splits.items()
        },
        notes=list(notes),
    ).model_dump_json()


def _digest_at(folder: Path) -> str | None:
    """Digest of the pack that is in a folder, None where there is none."""
    from workers.data.errors import DataError
    from workers.data.index import load_index

    try:
        return load_index(folder).digest
    except DataError:
        return None


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the error stream, where it does not mix with the result."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("packing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("packing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(index: PackIndex, out: Path) -> str:
    train, val = index.splits["train"], index.splits["val"]
    return (
        f"{index.num_documents:,} documents, {train.num_tokens + val.num_tokens:,} tokens "
        f"({index.tokenizer.kind}, vocabulary {index.vocab_size:,})\n"
        f"train {train.num_samples:,} samples of {index.seq_len} tokens, validation {val.num_samples:,}\n"
        f"digest {index.digest}\n"
        f"{out}"
    )


@data.command("verify")
@click.argument("pack", type=click.Path(path_type=Path))
@json_option
def verify(pack: Path, as_json: bool) -> int:
    """Read a pack whole and compare every shard with its index."""
    from orchestrator.waiting import waiting
    from workers.data.reader import PackReader

    with waiting(f"reading {pack}"):
        reader = PackReader(pack)
        reader.verify()
    if as_json:
        click.echo(_json(reader.index, pack))
        return 0
    splits = ", ".join(f"{split.num_tokens:,} tokens {name}" for name, split in sorted(reader.index.splits.items()))
    click.echo(f"{pack} is whole: {splits}, digest {reader.index.digest}")
    return 0
