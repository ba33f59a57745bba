"""What a lab looks like: regions with nodes, what each node's own line is like, and the links between places. Pure.

A packet from one node to another passes the sender's line upwards, the link between the two (of the nodes themselves,
else of their regions, else none: they are as near as a switch), and the receiver's line downwards.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from faults.lab.errors import LabError
from faults.lab.fabric import RoutePlan
from faults.lab.links import DEFAULT_QUEUE_MS, Shape
from faults.lab.targets import NAME, Regions, Target, duplicates, nodes_of, parse_target
from strategies.config import Section

MAX_NODES = 100
NO_HOSTS = ipaddress.IPv4Network("0.0.0.0/8")
LOCALHOST = "localhost"
# What orchestrator/config_errors.py looks for: a problem of several settings together, with its key and remedy.
CROSS_CHECK = "cross_check"

Name = Annotated[str, Field(pattern=rf"^{NAME}$")]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Congestion = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,15}$")]


class LinkSettings(Section):
    """`[links."us:eu"]`: the link between two regions or two nodes, in both directions ("us>eu": in one)."""

    rate_mbit: Rate | None = Field(None, description="Million bits of IP packets a second; unset = unlimited.")
    delay_ms: float = Field(0.0, ge=0, le=60_000, description="Delay of one direction.")
    jitter_ms: float = Field(0.0, ge=0, le=60_000, description="A packet is late by up to this much more; order kept.")
    loss: float = Field(0.0, ge=0, le=1, description="Share of packets that is lost.")
    queue_ms: float = Field(DEFAULT_QUEUE_MS, gt=0, le=60_000, description="Longest a packet waits for the rate.")


class LineSettings(Section):
    """The line of a node to the world; delay, jitter, loss and queue hold in each direction."""

    up_mbit: Rate | None = Field(None, description="Rate from the node; unset = unlimited.")
    down_mbit: Rate | None = Field(None, description="Rate to the node; unset = unlimited.")
    rate_mbit: Rate | None = Field(None, description="Both, where they are not given.")
    delay_ms: float = Field(0.0, ge=0, le=60_000, description="Delay of one direction.")
    jitter_ms: float = Field(0.0, ge=0, le=60_000, description="A packet is late by up to this much more; order kept.")
    loss: float = Field(0.0, ge=0, le=1, description="Share of packets that is lost.")
    queue_ms: float = Field(DEFAULT_QUEUE_MS, gt=0, le=60_000, description="Longest a packet waits for the rate.")


class NodeSettings(LineSettings):
    """`[nodes.NAME]`: what one node has otherwise than its region says."""

    congestion: Congestion | None = Field(None, description="TCP congestion control: cubic, bbr, ...")


class RegionSettings(NodeSettings):
    """`[regions.NAME]`: nodes, and what the line of each is like."""

    nodes: list[Name] = Field(min_length=1, max_length=MAX_NODES, description="Names of its nodes.")


class Topology(Section):
    """A network of nodes; what a file in `cluster_configs/topologies` holds."""

    description: str = Field("", description="What it stands for.")
    network: str | None = Field(None, description="IPv4 network of the nodes (10.201.7.0/24); unset = a free one.")
    congestion: Congestion | None = Field(None, description="TCP congestion control of all nodes; unset = the host's.")
    rto_max_ms: int | None = Field(
        None, ge=1000, le=120_000, description="Longest that TCP waits before it sends again; unset = the host's."
    )
    regions: dict[Name, RegionSettings] = Field(min_length=1, description="Region -> its nodes and their lines.")
    nodes: dict[str, NodeSettings] = Field(default_factory=dict, description="Single nodes that differ.")
    links: dict[str, LinkSettings] = Field(default_factory=dict, description="Links between places.")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        _check_names(self)
        _check_network(self)
        return self

    @property
    def members(self) -> Regions:
        """Region -> its nodes."""
        return {name: tuple(region.nodes) for name, region in self.regions.items()}

    def node_names(self) -> list[str]:
        """All nodes, in the order of the file."""
        return [node for region in self.regions.values() for node in region.nodes]

    def region_of(self, node: str) -> str:
        """The region of a node."""
        return next(name for name, region in self.regions.items() if node in region.nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlan:
    """A node as it will be made."""

    name: str
    region: str
    address: str
    mac: str
    congestion: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LabPlan:
    """A topology on a network, in the words of the switch.

    Attributes:
        network: IPv4 network with its prefix length.
        links: name of a direction ("us-1 up", "us>eu") -> its shape.
    """

    network: str
    nodes: tuple[NodePlan, ...]
    links: dict[str, Shape]
    routes: tuple[RoutePlan, ...]


def plan_lab(topology: Topology, network: str) -> LabPlan:
    """Lay a topology out on a network."""
    hosts = ipaddress.IPv4Network(network).hosts()
    nodes = tuple(
        NodePlan(
            name=name,
            region=(region := topology.region_of(name)),
            address=str(address),
            mac="02:a7:" + ":".join(f"{byte:02x}" for byte in address.packed),
            congestion=_line(topology, region, name).congestion or topology.congestion,
        )
        for name, address in zip(topology.node_names(), hosts, strict=False)
    )
    between = _pair_shapes(topology)
    links: dict[str, Shape] = {}
    for node in nodes:
        links |= line_shapes(node.name, _line(topology, node.region, node.name))
    links |= {f"{source}>{target}": shape for (source, target), shape in between.items()}
    routes = tuple(
        RoutePlan(source=one.name, target=other.name, links=_links_between(one, other, between))
        for one in nodes
        for other in nodes
        if one is not other
    )
    return LabPlan(network=network, nodes=nodes, links=links, routes=routes)


def line_shapes(node: str, line: LineSettings) -> dict[str, Shape]:
    """The two directions of a node's line."""
    both = {"delay_ms": line.delay_ms, "jitter_ms": line.jitter_ms, "loss": line.loss, "queue_ms": line.queue_ms}
    up, down = line.up_mbit or line.rate_mbit, line.down_mbit or line.rate_mbit
    return {f"{node} up": Shape(rate_mbit=up, **both), f"{node} down": Shape(rate_mbit=down, **both)}


def link_changes(topology: Topology, target_text: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `set` changes: name of a direction -> fields of `Shape` with their new values.

    Args:
        topology: the lab's.
        target_text: a node or region (its nodes' lines), or a link of the topology, in both directions or in one.
        values: keys of `[regions.NAME]` or `[links.NAME]`; None = back to the default.

    Raises:
        LabError: an unknown place, no such link, an unknown key, or a value out of range.
    """
    target = parse_target(target_text, topology.members)
    if not values:
        raise LabError(f"nothing to set for {target_text!r}", remedy="rate_mbit=100 or delay_ms=50")
    if target.other is None:
        fields = _checked(LineSettings, target, values)
        up, down = _line_changes(fields)
        nodes = nodes_of(target.place, topology.members)
        return {f"{node} {way}": dict(change) for node in nodes for way, change in (("up", up), ("down", down))}
    known = {f"{source}>{to}" for source, to in _pair_shapes(topology)}
    names = [f"{source}>{to}" for source, to in target.directions()]
    if missing := [name for name in names if name not in known]:
        raise LabError(
            f"this topology has no link {missing[0]!r}",
            remedy=f"one of {', '.join(sorted(topology.links)) or 'the nodes'}, or add it to the topology's [links]",
        )
    fields = _checked(LinkSettings, target, values)
    return {name: dict(fields) for name in names}


def _checked(model: type[Section], target: Target, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after validation by the model; defaults where they are None."""
    try:
        model.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = first["loc"][0]
        if first["type"] == "extra_forbidden":
            raise LabError(
                f"{target} has no setting {key!r}", remedy=f"one of {', '.join(model.model_fields)}"
            ) from error
        message = f"{target}: {key} = {first['input']!r} is not allowed: {first['msg']}"
        remedy = f"{key}=none for the default; {str(model.model_fields[str(key)].description).rstrip('.')}"
        raise LabError(message, remedy=remedy) from error
    unknown = [key for key in values if key not in model.model_fields]
    if unknown:
        raise LabError(f"{target} has no setting {unknown[0]!r}", remedy=f"one of {', '.join(model.model_fields)}")
    return {key: model.model_fields[key].default if value is None else value for key, value in values.items()}


def _line_changes(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a line as changes of its direction up and its direction down."""
    both = {key: value for key, value in fields.items() if key not in ("up_mbit", "down_mbit")}
    up, down = dict(both), dict(both)
    if "up_mbit" in fields:
        up["rate_mbit"] = fields["up_mbit"]
    if "down_mbit" in fields:
        down["rate_mbit"] = fields["down_mbit"]
    return up, down


def _line(topology: Topology, region: str, node: str) -> NodeSettings:
    """The settings of one node: its region's, then its own."""
    common = topology.regions[region].model_dump(exclude_unset=True, exclude={"nodes"})
    own = topology.nodes[node].model_dump(exclude_unset=True) if node in topology.nodes else {}
    if "rate_mbit" in own:
        common = {key: value for key, value in common.items() if key not in ("up_mbit", "down_mbit")}
    return NodeSettings(**(common | own))


def _pair_shapes(topology: Topology) -> dict[tuple[str, str], Shape]:
    """(from, to) places -> shape; what is said of one direction goes before what is said of both."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    targets = [(parse_target(name, topology.members), link) for name, link in topology.links.items()]
    for target, link in sorted(targets, key=lambda pair: pair[0].one_way):
        for direction in target.directions():
            settings[direction] = settings.get(direction, {}) | link.model_dump(exclude_unset=True)
    return {direction: Shape(**asdict(Shape()) | values) for direction, values in settings.items()}


def _links_between(one: NodePlan, other: NodePlan, between: Mapping[tuple[str, str], Shape]) -> tuple[str, ...]:
    ways = ((one.name, other.name), (one.region, other.region))
    middle = next((f"{source}>{target}" for source, target in ways if (source, target) in between), None)
    return (f"{one.name} up", *([middle] if middle else []), f"{other.name} down")


def _check_names(topology: Topology) -> None:
    names = topology.node_names()
    if twice := duplicates([*topology.regions, *names]):
        _refuse("regions", f"{twice[0]!r} is the name of two nodes or regions", "a name of its own for each")
    if LOCALHOST in names:
        _refuse("regions", f"no node can be called {LOCALHOST!r}: each node calls itself that", "node-1")
    if len(names) > MAX_NODES:
        _refuse("regions", f"{len(names)} nodes are too many", f"at most {MAX_NODES}")
    for name in topology.nodes:
        if name not in names:
            _refuse(f"nodes.{name}", f"[nodes.{name}]: no region has a node {name!r}", f"one of {', '.join(names)}")
    _check_links(topology)


def _check_links(topology: Topology) -> None:
    seen: dict[tuple[tuple[str, str], bool], str] = {}
    for name in topology.links:
        try:
            target = parse_target(name, topology.members)
        except LabError as error:
            _refuse(f"links.{name}", f"[links.{name!r}]: {error.message}", error.remedy or "two places")
        kinds = {place in topology.regions for place in (target.place, target.other)}
        if target.other is None or len(kinds) != 1:
            _refuse(f"links.{name}", f"[links.{name!r}] is no link", 'two regions or two nodes: "us:eu"')
        for direction in target.directions():
            if other := seen.get((direction, target.one_way)):
                _refuse(f"links.{name}", f"[links.{name!r}] and [links.{other!r}] are the same link", "one of them")
            seen[direction, target.one_way] = name


def _check_network(topology: Topology) -> None:
    if topology.network is None:
        return
    try:
        network = ipaddress.IPv4Network(topology.network)
    except ValueError as error:
        _refuse("network", f"network = {topology.network!r} is no IPv4 network: {error}", "10.201.7.0/24")
    num = len(topology.node_names())
    # Python calls these private too, and no host can have an address of theirs.
    unusable = network.is_loopback or network.is_reserved or network.network_address in NO_HOSTS
    if network.num_addresses - 2 < num or not network.is_private or unusable:
        problem = f"network = {topology.network!r} is not private, or too small for {num} nodes"
        _refuse("network", problem, "10.201.7.0/24")


def _refuse(key: str, message: str, remedy: str) -> NoReturn:
    context = {"key": key, "message": message, "remedy": remedy}
    raise PydanticCustomError(CROSS_CHECK, "{message}; try {remedy}", context)
