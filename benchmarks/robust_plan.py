"""What `make bench-robust` runs, and what must come out (pure; no torch).

Runs that a goal compares at the level of percents have three paired seeds. The table of all rules, and runs that only
repeat another one's bits, have one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.quality_plan import BATCH_SIZE, COMMON, SEQ_LEN, Settings

NUM_ISLANDS, ATTACKERS = 8, ("island-2", "island-5")
GROSS = ("sign_flip", "scale", "noise", "nan", "lying_owner")
STEALTHY = ("little_is_enough", "inner_product", "copy_cat", "label_flip")
RULES = ("mean", "clip", "median", "trimmed", "krum", "centered_clip", "nnm")
PRESET = "clip"  # of robust.toml
WIDE: Settings = {"robust.clip_times": 2.0}
"""For packs whose contributions are always longer than others'."""
STEPS, INNER_STEPS, SEEDS = 720, 30, (1, 2, 3)
OUTER: Settings = {"strategy.outer_lr": 0.9, "strategy.outer_momentum": 0.7}
"""What the sweep of `make bench-quality` found for rounds of so many steps."""
TUNED: Settings = {"strategy.outer_lr": 0.7, "strategy.outer_momentum": 0.5}
"""The best of 0.9 / 0.7, 0.9 / 0.5, 0.7 / 0.5 and averaging in so short runs (docs/log.md); gossip stands beside it."""
GOSSIP: Mapping[str, Settings] = {
    "noloco": {
        "strategy.name": "noloco",
        "strategy.outer_lr": 0.9,  # less momentum than published, and so less that members are apart (docs/gossip.md)
        "strategy.outer_momentum": 0.3,
        "strategy.gamma": 0.9,
    },
    "exponential": {"strategy.name": "gossip", "strategy.topology": "exponential"},
}
"""Row -> settings; all have one full merge, at the end. Beside them DiLoCo, the row `mean/clean/tuned`."""

REFUSED_ALREADY = ("nan",)  # plain averaging refuses what is not finite, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run: a rule, an attack or none, equal or skewed packs."""

    rule: str
    seed: int
    steps: int
    attack: str = ""
    verify: bool = False
    skewed: bool = False
    wide: bool = False
    gossip: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        """What the table calls it, whatever its seed."""
        if self.gossip:
            return f"gossip/{self.gossip}"
        parts = (
            self.rule,
            "verify" * self.verify,
            self.attack or "clean",
            "skewed" * self.skewed,
            "wide" * self.wide,
            "tuned" * self.tuned,
        )
        return "/".join(part for part in parts if part)

    @property
    def attackers(self) -> tuple[str, ...]:
        """Who does wrong."""
        return ATTACKERS if self.attack else ()

    @property
    def preset(self) -> str:
        """Of the run."""
        return str(GOSSIP[self.gossip]["strategy.name"]) if self.gossip else "diloco"

    @property
    def settings(self) -> Settings:
        """Of the run; the same seed has the same model, data and order under every rule."""
        merges: Settings = {"strategy.merge_every": self.steps // INNER_STEPS} if self.gossip else {}
        return {
            **COMMON,
            "run.islands": NUM_ISLANDS,
            "model.layers": 1,
            "exchange.chunk_values": 8192,  # every member owns a part of the 69,000 values
            "train.tokens": NUM_ISLANDS * self.steps * BATCH_SIZE * SEQ_LEN,
            "train.seed": self.seed,
            "train.lr": 5e-3,
            "train.schedule": "constant",  # as in the middle of a long run: noise of ten times one's length stays loud
            "strategy.inner_steps": INNER_STEPS,
            "codec.name": "int8",
            "eval.every": 0.5,
            "robust.rule": self.rule,
            "robust.num_wrong": 2,
            "robust.verify": self.verify,
            **(GOSSIP[self.gossip] if self.gossip else TUNED if self.tuned else OUTER),
            **merges,
            **(WIDE if self.wide else {}),
        }

    @property
    def overrides(self) -> list[str]:
        """`--set` arguments of its settings."""
        return [f"{key}={json.dumps(value)}" for key, value in sorted(self.settings.items())]


def all_jobs(steps: int, seeds: Sequence[int], rules: Sequence[str] = RULES) -> Iterator[Job]:
    """Everything, seed by seed, the goals' runs first."""
    for seed in seeds:
        yield from _of_goals(steps, seed)
        if seed == seeds[0]:
            yield Job(rule=PRESET, verify=True, seed=seed, steps=steps)
            yield Job(rule=PRESET, verify=True, skewed=True, wide=True, seed=seed, steps=steps)
            yield Job(rule=PRESET, verify=True, attack="sign_flip", skewed=True, seed=seed, steps=steps)
    for rule in rules:
        for attack in ("", *STEALTHY):
            if rule not in ("mean", PRESET):
                yield Job(rule=rule, attack=attack, seed=seeds[0], steps=steps)


def _of_goals(steps: int, seed: int) -> Iterator[Job]:
    for rule in ("mean", PRESET):
        yield Job(rule=rule, seed=seed, steps=steps)
    yield Job(rule="mean", tuned=True, seed=seed, steps=steps)
    for gossip in GOSSIP:
        yield Job(rule="mean", gossip=gossip, seed=seed, steps=steps)
    yield Job(rule="mean", skewed=True, seed=seed, steps=steps)
    yield Job(rule=PRESET, verify=True, skewed=True, seed=seed, steps=steps)
    for attack in GROSS:
        yield Job(rule=PRESET, verify=True, attack=attack, seed=seed, steps=steps)
        if attack not in REFUSED_ALREADY:
            yield Job(rule="mean", attack=attack, seed=seed, steps=steps)
    for attack in STEALTHY:
        for rule in ("mean", PRESET):
            yield Job(rule=rule, attack=attack, seed=seed, steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One thing that must be so; `met` None: not everything that it speaks of was run."""

    text: str
    found: str
    met: bool | None


def finals(records: Iterable[Mapping[str, Any]], name: str) -> dict[int, float | None]:
    """Seed -> final loss of a job; None: it diverged."""
    return {record["seed"]: record["final"] for record in records if record["job"] == name}


def ratio(records: Sequence[Mapping[str, Any]], name: str, base: str) -> float | None:
    """Mean over paired seeds of a job's final loss over another's; inf if it diverged; None if a pair is missing."""
    mine, theirs = finals(records, name), finals(records, base)
    pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    if not pairs:
        return None
    return mean(float("inf") if a is None or b is None else a / b for a, b in pairs)


def judge(records: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """The goals of the issue, as far as runs are there."""
    out: list[Goal] = []

    def at_most(text: str, name: str, base: str, limit: float) -> None:
        value, seeds = ratio(records, name, base), len(finals(records, name).keys() & finals(records, base).keys())
        found = f"{_show(value)}, {seeds} seed{'s' * (seeds > 1)}" if seeds else _show(value)
        out.append(Goal(text=text, found=found, met=None if value is None else value <= limit))

    at_most("without attackers the rule costs under 1 %", f"{PRESET}/clean", "mean/clean", 1.01)
    at_most("... with verify too", f"{PRESET}/verify/clean", "mean/clean", 1.01)
    at_most("NoLoCo, 8 islands: the full merge within 3 % of DiLoCo", "gossip/noloco", "mean/clean/tuned", 1.03)
    at_most("... one-peer exponential D-SGD beside it", "gossip/exponential", "mean/clean/tuned", float("inf"))
    met = [record for record in records if record["job"].startswith("gossip/")]
    alone = all(record["groups"] == [2] and record["exchanges"] == 1 for record in met)
    found = f"groups of {sorted({size for record in met for size in record['groups']})}"
    text = "no exchange has more than its pair, but for one full merge at the end"
    out.append(Goal(text=text, found=found, met=alone if met else None))
    for attack in GROSS:
        name = f"{PRESET}/verify/{attack}"
        at_most(f"{attack}: within 3 % of the clean run", name, "mean/clean", 1.03)
        if attack not in REFUSED_ALREADY:
            value = ratio(records, f"mean/{attack}", "mean/clean")
            text = f"{attack}: plain averaging ends more than 20 % worse"
            out.append(Goal(text=text, found=_show(value), met=None if value is None else value > 1.2))
        mine = [record for record in records if record["job"] == name]
        named = all(set(record["refused_early"]) == set(ATTACKERS) for record in mine)
        who = "yes" if named else str([record["refused_early"] for record in mine])
        text = f"{attack}: both attackers named within 5 exchanges, nobody else"
        out.append(Goal(text=text, found=who if mine else "not run", met=named if mine else None))
    for attack in STEALTHY:
        text = f"{attack}: no worse than plain averaging and 2 %"
        at_most(text, f"{PRESET}/{attack}", f"mean/{attack}", 1.02)
    skewed = f"{PRESET}/verify/clean/skewed"
    at_most("skewed packs: costs under 1 %", skewed, "mean/clean/skewed", 1.01)
    at_most("... with robust.clip_times = 2", f"{skewed}/wide", "mean/clean/skewed", 1.01)
    wrong = [
        (record["job"], record["seed"], set(record["banned"]) - set(ATTACKERS if "clean" not in record["job"] else ()))
        for record in records
    ]
    honest = [entry for entry in wrong if entry[2]]
    out.append(Goal(text="no honest member is banned, in any run", found=str(honest) if honest else "none",
                    met=not honest if records else None))  # fmt: skip
    return out


def _show(value: float | None) -> str:
    if value is None:
        return "not run"
    return "diverged" if value == float("inf") else f"{100 * (value - 1):+.2f} %"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Final loss over that of plain averaging without attackers, by rule and attack."""
    columns = ("clean", *STEALTHY)
    lines = ["| rule | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for rule in RULES:
        cells = [_show(ratio(records, f"{rule}/{attack}", "mean/clean")) for attack in columns]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
