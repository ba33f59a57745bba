"""How the run stands at one moment, now or in a replay: the figures at the top, the members, what broke, the ledger.

Figures are those of `orchestrator/summary.py`, with its formulas; a figure that cannot be told yet is None.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np

from faults.recovery import KINDS
from orchestrator.dashboard.book import ALL_STAGES, RunBook, StageStep, Totals, fault_moment
from orchestrator.metrics import PHASES, FaultEvent, LinkRow
from orchestrator.summary import data_parallel_bytes

RECENT_COMMITS = 10
MOST_EVENTS = 200
MOST_EXCHANGES = 12
GONE_PHASES = ("dead", "away")
DOING = {"compute": "computing", "sync": "synchronising", "evaluate": "evaluating", "start": "starting",
         "dead": "dead", "away": "left", "wait": "waiting"}  # fmt: skip
WAITING = {"exchange": "synchronising", "state": "starting", "": "computing"}


def run_figures(book: RunBook, at_s: float | None) -> dict[str, Any]:
    """Everything but the curves, JSON-ready. `at_s`: a moment of a replay; None: now."""
    live = at_s is None
    moment_s = _now(book) if at_s is None else at_s
    totals = book.totals_now() if live else book.totals_at(moment_s)
    members = _members(book, moment_s, live=live)
    return {
        "version": book.version,
        "run_id": book.about.run_id,
        "state": book.about.state,
        "live": book.view is not None,
        "at_s": round(moment_s, 3),
        "end_s": round(_now(book), 3),
        "figures": _figures(book, moment_s, totals, members, live=live),
        "members": members,
        "exchanges": {"open": _open(book, live), "done": _done(book, moment_s)},
        "events": _events(book, moment_s),
        "ledger": _ledger(book, totals, moment_s),
        "stages": _stages(book, moment_s),
        "about": _about(book),
        "problem": _problem(book),
    }


def _now(book: RunBook) -> float:
    """The end of what is known, or the controller's clock."""
    return max(book.end_s, float(book.view["seconds"])) if book.view is not None else book.end_s


def _about(book: RunBook) -> dict[str, Any]:
    setting = book.about.setting
    return {
        "strategy": setting("strategy", "name"),
        "codec": setting("codec", "name"),
        "inner_steps": setting("strategy", "inner_steps"),
        "tokens_target": setting("train", "tokens"),
        "params": book.state.num_params or None,
        "pipeline": setting("pipeline", "stages") is not None,
    }


def _problem(book: RunBook) -> str:
    if book.problem:
        return book.problem
    return f"{book.num_bad} rows of metrics.jsonl could not be read" if book.num_bad else ""


# ---------------------------------------------------------------- figures


def _figures(
    book: RunBook, moment_s: float, totals: Totals, members: list[dict[str, Any]], *, live: bool
) -> dict[str, Any]:
    done = book.exchanges_until(moment_s)
    evals = [row for row in book.evals if row.t_s <= moment_s]
    losses = [row.val_loss for row in evals if row.val_loss is not None]
    steps = _stage_steps(book, moment_s)
    tokens = steps[-1].num_steps * book.tokens_of_step() if steps else totals.committed * book.seq_len()
    target = book.about.setting("train", "tokens")
    speed = _stage_speed(book, steps) if steps else _recent_speed(book, moment_s)
    share = min(tokens / target, 1.0) if isinstance(target, int) and target > 0 else None
    left = max(target - tokens, 0) if isinstance(target, int) else 0
    there_s = _seconds_there(book, moment_s)
    return {
        "progress": share,
        "tokens": tokens,
        "rounds": done[-1].version if done else steps[-1].num_steps if steps else 0,
        "val_loss": losses[-1] if losses else None,
        "val_loss_first": losses[0] if losses else None,
        "val_loss_best": min(losses) if losses else None,
        "diverged": bool(evals) and evals[-1].val_loss is None,
        "train_loss": _train_loss(book, moment_s),
        "tokens_per_s": speed,
        "eta_s": left / speed if speed and left and book.about.state == "running" else None,
        "utilization": _ratio(book.steps.total("compute_s", moment_s), float(there_s.sum())),
        "goodput": _goodput(book, moment_s, tokens, there_s),
        "num_live": sum(member["here"] for member in members),
        "num_members": len(members),
        "num_faults": sum(t_s <= moment_s for t_s in book.noted_s) if steps else len(book.faults_until(moment_s)),
        **_bytes(book, moment_s, live=live),
    }


def _recent_speed(book: RunBook, moment_s: float) -> float | None:
    recent = book.exchanges_until(moment_s)[-RECENT_COMMITS:]
    if len(recent) < 2 or recent[-1].t_s <= recent[0].t_s:
        return None
    return (recent[-1].tokens_committed - recent[0].tokens_committed) / (recent[-1].t_s - recent[0].t_s)


def _stage_steps(book: RunBook, moment_s: float) -> list[StageStep]:
    """Steps of a pipeline up to a moment."""
    return book.stages[: bisect_right(book.stages, moment_s, key=lambda step: step.t_s)]


def _stage_speed(book: RunBook, steps: list[StageStep]) -> float | None:
    recent = steps[-RECENT_COMMITS:]
    seconds = recent[-1].t_s - recent[0].t_s
    return _ratio((recent[-1].num_steps - recent[0].num_steps) * book.tokens_of_step(), seconds)


def _train_loss(book: RunBook, moment_s: float) -> float | None:
    """Mean over the members of their newest losses."""
    newest = book.steps.newest(moment_s, len(book.members))
    losses = book.steps.columns.column("loss")[newest[newest >= 0]]
    losses = losses[np.isfinite(losses)]
    return round(float(losses.mean()), 5) if len(losses) else None


def _seconds_there(book: RunBook, moment_s: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each member from its first join to the moment, dead time included, away time not."""
    columns, num = book.spans.columns, len(book.members)
    member, phase = columns.column("member").astype(np.int64), columns.column("phase").astype(np.int64)
    start_s = columns.column("start_s")
    end_s = np.minimum(columns.column("end_s"), moment_s)
    begun = start_s <= moment_s
    first_s = np.full(num, np.inf)
    starting = phase == PHASES.index("start")
    np.minimum.at(first_s, member[begun], np.where(starting, columns.column("end_s"), start_s)[begun])
    away = begun & (phase == PHASES.index("away"))
    gone_s = np.bincount(member[away], weights=(end_s - start_s)[away], minlength=num)[:num]
    joined = np.isfinite(first_s)
    return np.where(joined, np.maximum(moment_s - np.where(joined, first_s, 0.0) - gone_s, 0.0), 0.0)


def _goodput(
    book: RunBook, moment_s: float, tokens: int, there_s: np.ndarray[Any, np.dtype[np.float64]]
) -> float | None:
    """Committed tokens over what the members would have made, each at its own median speed without faults."""
    windows = [_fault_window(row) for row in book.faults_until(moment_s)]
    num = len(book.members)
    speed = book.steps.medians("tokens_per_s", moment_s, num, windows)
    within = book.steps.medians("tokens_per_s", moment_s, num, ())
    speed = np.where(np.isnan(speed), within, speed)
    if not num or np.isnan(speed).all():
        return None
    speed = np.where(np.isnan(speed), np.nanmedian(speed), speed)
    return _ratio(tokens, float((speed * there_s).sum()))


def _fault_window(row: FaultEvent) -> tuple[float, float]:
    end = row.contributed_s if row.contributed_s is not None else row.back_s
    return fault_moment(row), end if end is not None else math.inf


def _bytes(book: RunBook, moment_s: float, *, live: bool) -> dict[str, Any]:
    """What was sent, and what data parallel would have sent for the same steps (fp32, ring all-reduce)."""
    steps = _stage_steps(book, moment_s)
    sent = steps[-1].bytes_sent if steps else sum(row.bytes for row in book.exchanges_until(moment_s))
    if live and book.view is not None:
        sent += int(book.view.get("bytes_sent", 0))
    num_steps = round(book.steps.total("step_num", moment_s))
    instead = data_parallel_bytes(
        params=book.state.num_params, num_member_steps=num_steps, num_members=len(book.members)
    )
    return {"bytes_sent": sent, "bytes_data_parallel": instead or None, "num_steps": num_steps}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


# ---------------------------------------------------------------- members and links


def _members(book: RunBook, moment_s: float, *, live: bool) -> list[dict[str, Any]]:
    num = len(book.members)
    steps, spans = book.steps.newest(moment_s, num), book.spans.at(moment_s, num)
    return [
        {
            "name": name,
            "node": book.nodes.get(name, "")[:12],
            **_step_of(book, int(steps[place])),
            **_standing(book, name, moment_s, int(spans[place]), live=live),
        }
        for name, place in book.in_order()
        if name != ALL_STAGES and (live or steps[place] >= 0 or spans[place] >= 0)
    ]


def _step_of(book: RunBook, at: int) -> dict[str, Any]:
    if at < 0:
        return {"loss": None, "tokens_per_s": None}
    columns = book.steps.columns
    loss = float(columns.column("loss")[at])
    return {
        "loss": round(loss, 4) if math.isfinite(loss) else None,
        "tokens_per_s": round(float(columns.column("tokens_per_s")[at]), 1),
    }


def _standing(book: RunBook, name: str, moment_s: float, span: int, *, live: bool) -> dict[str, Any]:
    """What a member does, whether it is here, which incarnation, and why."""
    spans = book.spans.columns
    phase = PHASES[int(spans.column("phase")[span])] if span >= 0 else "start"
    incarnation = int(spans.column("incarnation")[span]) if span >= 0 else 1
    if not live:
        return _standing_then(book, name, moment_s, phase, incarnation)
    incarnation = book.state.last_incarnation.get(name, incarnation)
    if book.about.state not in ("running", "interrupted"):
        return _stands("ended", incarnation, here=False)
    if book.num_rows and name not in book.state.current:
        why = book.fences.get((name, incarnation), "")
        left = why == "it left"
        return _stands("left" if left else "dead", incarnation, here=False, why=why)
    told = (book.view or {}).get("members", {}).get(name)
    if told is None and book.stages:
        return _stands("computing", incarnation)
    if told is None:
        return _stands(DOING[phase] if phase not in GONE_PHASES else "starting", incarnation)
    if told["status"] == "suspect":
        return _stands("cut off", incarnation, why=told["reason"], here=True)
    if told["leaving"]:
        return _stands("leaving", incarnation, why="hands over what it has")
    doing = (
        DOING["evaluate"] if phase == "evaluate" and not told["waiting"] else WAITING.get(told["waiting"], "waiting")
    )
    why = "" if doing != "waiting" else f"waits for {told['waiting']}"
    return _stands("starting" if told["status"] == "joining" else doing, incarnation, why=why)


def _standing_then(book: RunBook, name: str, moment_s: float, phase: str, incarnation: int) -> dict[str, Any]:
    for silence in book.silences:
        if silence.member == name and silence.start_s <= moment_s < silence.end_s:
            return _stands("cut off", incarnation)
    for fault in book.faults_until(moment_s):
        if fault.member == name and (fault.back_s is None or moment_s < fault.back_s) and phase != "start":
            return _stands("dead", incarnation, here=False, why=fault.fault)
    return _stands(DOING[phase], incarnation, here=phase not in GONE_PHASES)


def _stands(doing: str, incarnation: int, *, here: bool = True, why: str = "") -> dict[str, Any]:
    return {"doing": doing, "incarnation": incarnation, "here": here, "why": why}


def run_links(book: RunBook, moment_s: float) -> dict[str, Any]:
    """`links`: `[from, to, bytes per second, round trip in seconds, age in seconds]` of each at its last measurement.

    `from` and `to` are places in `names`: there are tens of thousands of links among hundreds of members.
    """
    links = []
    for (source, target), rows in book.links.items():
        until = bisect_right(rows, moment_s, key=_moment)
        if until:
            last = rows[until - 1]
            round_trips = [row.rtt_s for row in rows[max(until - 6, 0) : until] if row.rtt_s is not None]
            rtt_s = min(round_trips, default=None)
            rate = round(last.bytes_per_s) if last.bytes_per_s is not None else None
            age_s = round(moment_s - last.t_s, 1)
            links.append([book.place(source), book.place(target), rate, rtt_s and round(rtt_s, 6), age_s])
    return {"names": book.members, "links": links}


def _moment(row: LinkRow) -> float:
    return row.t_s


# ---------------------------------------------------------------- what happened


def _open(book: RunBook, live: bool) -> list[dict[str, Any]]:
    return list(book.view["exchanges"]) if live and book.view is not None else []


def _done(book: RunBook, moment_s: float) -> list[dict[str, Any]]:
    return [
        {
            "t_s": round(row.t_s, 3),
            "fragment": row.fragment,
            "version": row.version,
            "roster": len(row.roster),
            "seconds": round(row.seconds, 4),
            "waited_s": round(max(row.t_s - row.opened_s - row.seconds, 0.0), 4),
            "bytes": row.bytes,
            "attempts": row.attempts,
            "why": row.closed_because,
        }
        for row in reversed(book.exchanges_until(moment_s)[-MOST_EXCHANGES:])
    ]


def _events(book: RunBook, moment_s: float) -> list[dict[str, Any]]:
    """Faults with what followed, and everything else that the journal tells, newest first."""
    events: list[dict[str, Any]] = []
    for fault in book.faults_until(moment_s):
        start = fault_moment(fault)
        after = {
            key: round(t_s - start, 3)
            for key, t_s in (
                ("next_commit_s", fault.next_commit_s),
                ("back_s", fault.back_s),
                ("contributed_s", fault.contributed_s),
            )
            if t_s is not None and t_s <= moment_s
        }
        if fault.injected_s is not None and fault.detected_s is not None:
            after["noticed_s"] = round(fault.detected_s - fault.injected_s, 3)
        events.append(
            {"t_s": round(start, 3), "kind": fault.fault, "member": fault.member, "tone": "bad", "after": after}
        )
    lost = {(fault.member, round(fault.detected_s or 0.0, 1)) for fault in book.faults.values()}
    for happening in book.happenings:
        t_s = book.end_s if happening.t_s is None else happening.t_s
        told = (happening.member, round(t_s, 1)) in lost and happening.kind in KINDS
        if t_s <= moment_s and not told and happening.kind != "kill":
            text = happening.text
            events.append(
                {"t_s": round(t_s, 3), "kind": happening.kind, "member": happening.member,
                 "tone": happening.tone, "text": text}
            )  # fmt: skip
    events.sort(key=lambda event: float(event["t_s"]), reverse=True)
    return events[:MOST_EVENTS]


def _ledger(book: RunBook, totals: Totals, moment_s: float) -> dict[str, Any]:
    seq_len, steps = book.seq_len(), _stage_steps(book, moment_s)
    return {
        "seq_len": seq_len,
        "committed": steps[-1].num_steps * book.tokens_of_step() if steps else totals.committed * seq_len,
        "under_way": max((totals.leased - totals.committed - totals.dropped - totals.partial) * seq_len, 0),
        "lost": totals.lost * seq_len,
        "reissued": totals.reissued * seq_len,
        "dropped": totals.dropped * seq_len,
        "partial": totals.partial * seq_len,
        "journal_rows": book.num_rows,
        "discarded": (book.view or {}).get("discarded", (book.about.summary or {}).get("exchanges_discarded")),
    }


def _stages(book: RunBook, moment_s: float) -> list[dict[str, Any]]:
    """The stages of a pipeline as its newest step until then shows them, what `atoll status` says."""
    steps = _stage_steps(book, moment_s)
    return steps[-1].table if steps else []
