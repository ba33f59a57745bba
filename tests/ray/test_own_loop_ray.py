"""Loops and models of the user's own on Ray: images on two islands, the README's commands, a loop that is wrong."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import atoll
from orchestrator.cli.main import main
from orchestrator.launch import RaySession
from orchestrator.ledger import ledger_command
from orchestrator.rundir import open_run_dir
from orchestrator.summary import load_summary
from tests.own_loops import CONFIG, NUM_IMAGES, ConvNet, digest_of
from tests.readme import README, blocks, commands
from tests.small_run import small_config

pytestmark = pytest.mark.ray

SMALL = (
    "run.islands=1", "train.tokens=640", "train.batch_size=4", "train.device=cpu", "strategy.inner_steps=5",
    "codec.name=fp32", "eval.windows=4", "exchange.heartbeat_s=0.2",
)  # fmt: skip
LOOP = """
import torch
import atoll

def my_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

def main():
    model = torch.nn.Sequential(torch.nn.Embedding(257, 8), torch.nn.Linear(8, 257)).to(atoll.device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, pack_dir: Path) -> Iterator[Path]:
    """A user's folder with the README's files in it, and one Ray that was started there."""
    folder, before = tmp_path_factory.mktemp("user"), Path.cwd()
    (folder / "my_model.py").write_text(blocks("Your own model", "python")[0])
    snippet = blocks("Your own loop", "python")[0].replace(", config)", ")")
    (folder / "my_loop.py").write_text(LOOP + textwrap.indent(snippet, "    "))
    os.chdir(folder)
    path = list(sys.path)
    try:
        with RaySession(small_config(pack_dir, "run.islands=4")):
            yield folder
    finally:
        os.chdir(before)
        sys.path[:] = path


def run_command(words: list[str], pack_dir: Path) -> None:
    """A command of the README, made small."""
    extra = [word for setting in (*SMALL, f"data.path={pack_dir}") for word in ("--set", setting)]
    assert main([*words, *extra, "--json"]) == 0


def test_images_on_two_islands(here: Path) -> None:
    config = {**CONFIG, "data.samples": NUM_IMAGES, "train.loop": "tests.own_loops:train_images", "run.islands": 2}
    summary = atoll.train(config, here / "images", quiet=True)
    assert summary.exit_reason == "done" and summary.tokens_committed == CONFIG["train.tokens"]
    assert summary.initial_val_loss is not None and summary.final_val_loss is not None
    assert summary.final_val_loss < 0.6 * summary.initial_val_loss
    assert ledger_command(here / "images", as_json=True) == 0
    ends = [(here / "images" / f"end-island-{i}.txt").read_text().split() for i in range(2)]
    model = ConvNet()
    model.load_state_dict(atoll.load_anchor(here / "images"))
    assert {end[0] for end in ends} == {digest_of(model)}


def test_the_command_for_your_own_model(here: Path, pack_dir: Path) -> None:
    (words,) = commands(blocks("Your own model", "")[0])
    run_command(words, pack_dir)
    summary = load_summary(open_run_dir().path)
    assert summary.exit_reason == "done" and summary.params == 256 * 64 + 64 * 256 + 256


def test_the_command_for_your_own_loop(here: Path, pack_dir: Path) -> None:
    command = "atoll train diloco --set train.loop=my_loop:main"
    assert command in README.read_text()
    run_command(command.split()[1:], pack_dir)
    summary = load_summary(open_run_dir().path)
    assert summary.exit_reason == "done" and summary.params == 257 * 8 + 8 * 257 + 257
    assert summary.final_val_loss is not None


def test_the_first_start_guesses_what_link_is_needed_and_the_second_knows(
    here: Path, pack_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(pack_dir, "run.islands=2", "train.tokens=1280")
    said = []
    for name in ("first", "second"):
        assert atoll.train(config, here / "timed" / name).exit_reason == "done"
        said.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("synchronising")))
    guess = r"synchronising \S+ kB about every \S+ m?s: needs about \S+ .bit/s at each island \(every 8 steps of about "
    assert re.match(guess, said[0]) and said[0].endswith("by a few made here; fp32)"), said
    assert re.match(r"synchronising \S+ kB every \S+ m?s: needs ", said[1]) and "as in first; fp32" in said[1], said


def test_a_loop_that_is_wrong_fails_the_run_at_once_with_its_reason(here: Path) -> None:
    config = {**CONFIG, "data.samples": NUM_IMAGES, "train.loop": "tests.own_loops:leave_early", "run.islands": 1}
    with pytest.raises(atoll.RunFailed, match=r"island-0: LoopError: .*returned before the run was over"):
        atoll.train(config, here / "early", quiet=True)
    assert load_summary(here / "early").exit_reason == "failed"
