"""Whether a cluster has room for a run: places on machines with the labels that it asks for, and who uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

RAYS_OWN = "ray.io/"  # labels that Ray gives to every node


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a cluster has at a moment.

    Attributes:
        places: of the machines with the labels of the run.
        free: of these, those that no run uses.
        elsewhere: places of the other machines.
        known: labels that any machine has, as KEY=VALUE.
    """

    places: int
    free: int
    elsewhere: int
    known: tuple[str, ...] = ()


def look(labels: Mapping[str, str]) -> Room:
    """Of the cluster that this process is connected to."""
    import ray

    from orchestrator.processes import worker_nodes

    total, free = worker_nodes(labels)
    known = {
        f"{key}={value}"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
        for key, value in (node.get("Labels") or {}).items()
        if not key.startswith(RAYS_OWN)
    }
    places, everywhere = sum(total.values()), sum(worker_nodes({})[0].values())
    return Room(places=places, free=sum(free.values()), elsewhere=everywhere - places, known=tuple(sorted(known)))


def num_needed(config: RunConfig) -> int:
    """Places without which the run does not begin; also of a configuration that is not resolved yet."""
    if config.pipeline.stages is not None:
        return config.pipeline.num_processes
    return 1 if config.run.islands == "auto" else config.run.islands


def check_room(config: RunConfig, room: Room) -> None:
    """Raises UserError where the run can never have all its islands, whoever else ends."""
    needed, labels = num_needed(config), _as_text(config.run.labels)
    if room.places >= needed:
        return
    what = "processes" if config.pipeline.stages is not None else "islands"
    where = f"the cluster at {config.run.address!r}" if config.run.address is not None else "the Ray of this process"
    has = f"{where} has room for {room.places} {what} (resource atoll_worker)"
    if room.places + room.elsewhere < needed or not labels:
        if config.run.address is not None:
            remedy = "a smaller run.islands, atoll up --workers N, or atoll join ... --workers N on another machine"
        else:
            remedy = (
                f"ray.init(resources={{'atoll_worker': {needed}}}), or ray.shutdown() before: a Ray of its own then"
            )
        raise UserError(f"{has}, the run has {needed}", place="run.address", remedy=remedy)
    wanted = " ".join(f"--label {part}" for part in labels.split(", "))
    known = f"labels there are {', '.join(room.known)}" if room.known else "no machine there has a label"
    raise UserError(
        f"{has} on machines with the label {labels}, the run has {needed}",
        place="run.labels",
        remedy=f"atoll join ... {wanted} on such a machine; {known}",
    )


def who_is_waited_for(config: RunConfig, room: Room) -> str:
    """What to say where other runs use places that this one needs; empty where it can begin. An elastic run can."""
    needed = num_needed(config)
    free = max(min(room.free, needed), 0)
    if free == needed or (config.run.elastic and free):
        return ""
    labels = _as_text(config.run.labels)
    on = f" on machines with {labels}" if labels else ""
    return (
        f"{needed - free} of the {needed} places that it needs{on} are used by other runs: it waits for them "
        "(atoll runs --at ADDRESS shows these)"
    )


def _as_text(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
