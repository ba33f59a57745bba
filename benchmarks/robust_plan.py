"""What `make bench-robust` runs, and what must come out (pure; no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.quality_plan import BATCH_SIZE, COMMON, SEQ_LEN, Value

NUM_ISLANDS, ATTACKERS = 8, ("island-2", "island-5")
GROSS = ("sign_flip", "scale", "noise", "nan", "lying_owner")
STEALTHY = ("little_is_enough", "inner_product", "copy_cat", "label_flip")
RULES = ("mean", "clip", "median", "trimmed", "krum", "centered_clip", "nnm")
PRESET = "clip"  # of robust.toml
STEPS, INNER_STEPS, SEEDS = 600, 30, (1, 2, 3)
BETA = 0.9  # of NoLoCo: the learning rate of DiLoCo here, so that the means make the same steps
GOSSIP = {"noloco": ("noloco", "random"), "exponential": ("gossip", "exponential"), "pairs": ("gossip", "random")}
"""Row -> what a pair does, and who meets whom; beside them DiLoCo, which is the row `mean/clean`."""

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
    gossip: str = ""

    @property
    def name(self) -> str:
        """What the table calls it, whatever its seed."""
        if self.gossip:
            return f"gossip/{self.gossip}"
        parts = (self.rule, "verify" * self.verify, self.attack or "clean", "skewed" * self.skewed)
        return "/".join(part for part in parts if part)

    @property
    def attackers(self) -> tuple[str, ...]:
        """Who does wrong."""
        return ATTACKERS if self.attack else ()

    @property
    def settings(self) -> Mapping[str, Value]:
        """Of the run; the same seed has the same model, data and order under every rule."""
        return {
            **COMMON,
            "run.islands": NUM_ISLANDS,
            "exchange.chunk_values": 16384,
            "train.tokens": NUM_ISLANDS * self.steps * BATCH_SIZE * SEQ_LEN,
            "train.seed": self.seed,
            "train.lr": 5e-3,
            "strategy.inner_steps": INNER_STEPS,
            "strategy.outer_lr": 0.9,
            "strategy.outer_momentum": 0.5,
            "codec.name": "int8",
            "eval.every": 0.5,
            "robust.rule": self.rule,
            "robust.num_wrong": 2,
            "robust.verify": self.verify,
        }


def all_jobs(steps: int, seeds: Sequence[int], rules: Sequence[str] = RULES) -> Iterator[Job]:
    """Everything, the goals' runs first."""
    for seed in seeds:
        for rule, verify in (("mean", False), (PRESET, False), (PRESET, True)):
            yield Job(rule=rule, verify=verify, seed=seed, steps=steps)
        for gossip in GOSSIP:
            yield Job(rule="mean", gossip=gossip, seed=seed, steps=steps)
        for attack in GROSS:
            yield Job(rule=PRESET, verify=True, attack=attack, seed=seed, steps=steps)
            if attack not in REFUSED_ALREADY:
                yield Job(rule="mean", attack=attack, seed=seed, steps=steps)
        for attack in ("", "sign_flip"):
            yield Job(rule=PRESET, verify=True, attack=attack, skewed=True, seed=seed, steps=steps)
        yield Job(rule="mean", skewed=True, seed=seed, steps=steps)
        for attack in STEALTHY:
            for rule in ("mean", PRESET):
                yield Job(rule=rule, attack=attack, seed=seed, steps=steps)
    for seed in seeds:
        for rule in rules:
            for attack in ("", *STEALTHY):
                if rule not in ("mean", PRESET):
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
        value = ratio(records, name, base)
        out.append(Goal(text=text, found=_show(value), met=None if value is None else value <= limit))

    at_most("without attackers the rule costs under 1 %", f"{PRESET}/clean", "mean/clean", 1.01)
    at_most("... with verify too", f"{PRESET}/verify/clean", "mean/clean", 1.01)
    at_most("NoLoCo, 8 islands: the full merge within 3 % of DiLoCo", "gossip/noloco", "mean/clean", 1.03)
    met = [record for record in records if record["job"].startswith("gossip/")]
    alone = all(record["group_sizes"] in ([2], [2, NUM_ISLANDS]) for record in met)
    found = str(sorted({size for record in met for size in record["group_sizes"]}))
    text = "no exchange has more than its pair, but for the full merge at the end"
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
        out.append(Goal(text=f"{attack}: both attackers named within 5 exchanges, nobody else",
                        found="yes" if named else str([record["refused_early"] for record in mine]),
                        met=named if mine else None))  # fmt: skip
    for attack in STEALTHY:
        text = f"{attack}: no worse than plain averaging and 2 %"
        at_most(text, f"{PRESET}/{attack}", f"mean/{attack}", 1.02)
    at_most("skewed packs: costs under 1 %", f"{PRESET}/verify/clean/skewed", "mean/clean/skewed", 1.01)
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
