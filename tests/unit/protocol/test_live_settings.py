"""Which settings hold for which version, and what a run of real islands makes of a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import events as ev
from orchestrator.errors import UserError
from orchestrator.ledger import recompute
from orchestrator.live import check_changes, live_keys
from orchestrator.local import LocalRun
from orchestrator.rollback import find_target, pin
from orchestrator.segments import read_run
from tests.small_run import make_pack, small_config
from workers.live_settings import LiveSettings
from workers.records import CommitRecord, RollbackRecord, SettingRecord
from workers.saved import newest, read_manifest


def change(key: str, value: float | str | None, *since: int) -> SettingRecord:
    return SettingRecord(key=key, value=value, since=since)


def test_a_change_holds_from_its_version_on() -> None:
    settings = LiveSettings()
    settings.add(change("strategy.outer_lr", 0.5, 5, 7))
    assert settings.at(0, 4) == settings.at(1, 6) == ()
    assert settings.at(0, 5) == settings.at(1, 7) == (("strategy.outer_lr", 0.5),)
    settings.add(change("strategy.outer_lr", 0.9, 6, 8))
    assert settings.at(0, 5) == (("strategy.outer_lr", 0.5),)
    assert settings.at(0, 6) == (("strategy.outer_lr", 0.9),)


def test_members_compute_with_nothing_that_only_the_controller_decides_by() -> None:
    settings = LiveSettings()
    settings.add(change("strategy.outer_lr", 0.5, 1))
    settings.add(change("exchange.min_members", 2, 1))
    assert settings.of_members(0, 1) == (("strategy.outer_lr", 0.5),)
    assert settings.at(0, 1) == (("exchange.min_members", 2), ("strategy.outer_lr", 0.5))


def test_after_a_rollback_what_was_set_holds_at_once() -> None:
    settings = LiveSettings()
    settings.add(change("strategy.outer_lr", 0.5, 5))
    settings.roll_back((3,))
    assert settings.at(0, 2) == ()
    assert settings.at(0, 3) == (("strategy.outer_lr", 0.5),)


def test_only_marked_settings_change(tmp_path: Path) -> None:
    assert live_keys() == (
        "strategy.inner_steps", "strategy.outer_lr", "codec.name",
        "exchange.quorum", "exchange.min_members", "exchange.grace_s",
    )  # fmt: skip
    config = small_config(tmp_path)
    assert check_changes(config, {}, {"strategy.outer_lr": 1}) == (("strategy.outer_lr", 1.0),)
    for key, value, told in (
        ("train.lr", 1.0, "train.lr cannot change"),
        ("strategy.inner_stepz", 1, "inner_steps"),
        ("strategy.outer_lr", "much", "outer_lr"),
        ("exchange.min_members", 9, "min_members"),
        ("exchange.min_members", 0, "exchange.min_members = 0"),
        ("exchange.grace_s", -1.0, "exchange.grace_s = -1.0"),
        ("exchange.copies", 1, "exchange.copies cannot change"),
        ("strategy.outer_lr", 9.0, "unstable"),
    ):
        with pytest.raises(UserError) as raised:
            check_changes(config, {}, {key: value})
        assert told in f"{raised.value} {raised.value.remedy}"
    with pytest.raises(UserError, match="no effect"):
        check_changes(config.with_values({"strategy.outer": "average"}), {}, {"strategy.outer_lr": 0.5})


def test_a_run_that_machines_join_may_ask_for_more_members_than_it_began_with(tmp_path: Path) -> None:
    config = small_config(tmp_path, "run.elastic=true", "run.address=auto")
    assert config.run.islands == 1
    assert check_changes(config, {}, {"exchange.min_members": 3}) == (("exchange.min_members", 3),)


def test_a_minimum_is_unset_again(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert check_changes(config, {"exchange.min_members": 2}, {"exchange.min_members": None}) == (
        ("exchange.min_members", None),
    )


@pytest.mark.parametrize(
    ("value", "told"), [(5, "no multiple of the 2 fragments"), (2, "strategy.overlap_steps = 2 is longer")]
)
def test_a_period_that_fragments_at_even_distances_cannot_have_is_refused(
    tmp_path: Path, value: int, told: str
) -> None:
    streaming = ("strategy.name=streaming", "strategy.inner_steps=8", "strategy.num_fragments=2")
    config = small_config(tmp_path, *streaming, "strategy.overlap_steps=2")
    assert check_changes(config, {}, {"strategy.inner_steps": 4}) == (("strategy.inner_steps", 4),)
    with pytest.raises(UserError) as raised:
        check_changes(config, {}, {"strategy.inner_steps": value})
    assert told in str(raised.value)


def digests(run: LocalRun) -> list[str]:
    return [row.record.digest for row in run.host.journal.rows if isinstance(row.record, CommitRecord)]


def until_version(run: LocalRun, n: int) -> None:
    run.run(until=lambda: bool(run.host.coordinator.state.heads) and run.host.coordinator.state.heads[0].version.n >= n)


def set_now(run: LocalRun, **values: float | str) -> None:
    changes = tuple((key.replace("__", "."), value) for key, value in values.items())
    run.host.handle(ev.SettingsRequested(values=changes))


def test_islands_take_a_change_up_at_one_version(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    config = small_config(pack, "run.islands=2", "train.tokens=15360")
    runs = {}
    for name in ("plain", "changed"):
        run = runs[name] = LocalRun(config, tmp_path / name)
        run.start()
        until_version(run, 3)
        if name == "changed":
            set_now(run, strategy__outer_lr=0.4, codec__name="int4", strategy__inner_steps=4)
        assert run.run() is not None
    plain, changed = digests(runs["plain"]), digests(runs["changed"])
    assert plain[:4] == changed[:4], "the transition under way when it was set is as before"
    assert plain[4] != changed[4]
    assert len(changed) > len(plain), "half the steps of a round"
    records = [row.record for row in runs["changed"].host.journal.rows]
    assert [r.since for r in records if isinstance(r, SettingRecord)] == [(4,)] * 3
    for run in runs.values():
        held = {island.loop.island.sync.replica.digest(0) for island in run.islands.values() if island.loop.island.sync}
        assert held == {digests(run)[-1]}
        run.close()


def test_a_run_goes_back_and_comes_out_with_every_sample_counted_once(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    run = LocalRun(small_config(pack, "run.islands=2", "train.tokens=15360"), tmp_path / "run")
    run.start()
    until_version(run, 3)
    run.host.handle(ev.SaveRequested())
    until_version(run, 6)
    [saved] = [path for path in (tmp_path / "run" / "snapshots").glob("v*")]
    manifest = read_manifest(saved)
    before = digests(run)
    snapshots, version = saved.parent, max(manifest["versions"])
    with pytest.raises(UserError, match="no snapshot of version 99"):
        find_target(snapshots, run.host.coordinator.state, 99)
    target = find_target(snapshots, run.host.coordinator.state, version)
    pin(snapshots, target)
    run.host.handle(ev.SaveRequested())
    until_version(run, 7)
    assert (snapshots / "v6").is_dir()
    run.host.handle(
        ev.RollbackRequested(name=target.name, versions=target.versions, chains=target.chains, why="a test")
    )
    assert not (snapshots / "v6").exists() and (snapshots / "rolled-back" / "v6").is_dir()
    assert newest(snapshots) in (saved, snapshots / "rollback")
    assert run.host.coordinator.state.heads[0].version.n == manifest["versions"][0]
    assert run.run() is not None
    run.close()
    rows = read_run(tmp_path / "run").rows
    [back] = [place for place, row in enumerate(rows) if isinstance(row.record, RollbackRecord)]
    after = [row.record for row in rows[back:] if isinstance(row.record, CommitRecord)]
    assert after[0].n == manifest["versions"][0] + 1
    assert after[0].digest not in before
    ledger = recompute(rows)
    assert ledger.ok, ledger.findings
    assert ledger.samples()["full"] == 15360 // 16
