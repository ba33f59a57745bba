"""What is checked before a machine joins, so that what cannot work fails in words, and before Ray is started."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from orchestrator.cluster.door import dial
from orchestrator.cluster.door_client import ClusterInfo, visit, way_back
from orchestrator.cluster.join_string import JoinString, parse_address
from orchestrator.cluster.state import ray_host
from orchestrator.cluster.versions import disagreements, my_versions
from orchestrator.errors import ClusterUnreachable, UserError

# Reserved for documents: a route there is the default route. Nothing is sent.
ANYWHERE = ("203.0.113.1", 9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What a joiner learns.

    Attributes:
        node_ip: the address that this machine gives to the others.
    """

    gcs_address: str
    node_ip: str
    wan: bool


def check_join(place: JoinString, *, node_ip: str | None, wan: bool) -> Admission:
    """Visit the door and check all that the two machines must have in common, and both ways between them.

    Raises:
        ClusterUnreachable: the door or Ray does not answer, or the way back is closed.
        UserError: wrong token, other versions, another profile, or `node_ip` is no address of this machine.
    """
    node_ip = None if node_ip is None else own_address(node_ip)
    info = visit(place)
    if different := disagreements(my_versions(), info.versions):
        raise UserError(
            f"this machine cannot join: {'; '.join(different)}",
            place=place.door,
            remedy="install the same versions on all machines",
        )
    if wan and not info.wan:
        raise UserError(
            "--wan, but the cluster was started without it",
            place=place.door,
            remedy="atoll up --wan there, or leave it out here: a machine that joins takes the cluster's setting",
        )
    check_gcs(place, info)
    check_way_back(place, info)
    return Admission(gcs_address=info.gcs_address, node_ip=ray_host(node_ip or info.my_address), wan=info.wan)


def check_gcs(place: JoinString, info: ClusterInfo) -> None:
    """See whether Ray's own port can be reached; raises ClusterUnreachable."""
    if not info.gcs_address:
        raise ClusterUnreachable("the cluster is starting", place=place.door, remedy="try again in a few seconds")
    result = dial(*parse_address(info.gcs_address))
    if not result["reached"]:
        raise ClusterUnreachable(
            f"the door answers, but Ray does not: {result['why']}",
            place=info.gcs_address,
            remedy="let this port through the firewall there; all ports between the machines of a cluster must be open",
        )


def check_way_back(place: JoinString, info: ClusterInfo) -> None:
    """See whether the head can dial this machine; raises ClusterUnreachable."""
    result = way_back(place, info.my_address)
    if not result.reached:
        raise ClusterUnreachable(
            f"the cluster cannot reach this machine at {result.host}: {result.why}",
            place=f"{result.host}:{result.port}",
            remedy="open the firewall here; behind NAT, put all machines into one network (WireGuard, Tailscale)",
        )


def own_address(host: str, place: str = "--node-ip") -> str:
    """The IP address of a name or address of this machine.

    Raises:
        UserError: it is none.
    """
    address = address_of(host, place)
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        raise UserError(
            f"{host} is no address of this machine: {error.strerror}",
            place=place,
            remedy="one of those that hostname -I lists; without the option it is the one on the way to the cluster",
        ) from error
    return address


def default_host() -> str:
    """The address of the interface with the default route.

    Raises:
        UserError: there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ANYWHERE)
        except OSError as error:
            raise UserError(
                f"this machine has no default route: {error.strerror}",
                place="--host",
                remedy="--host ADDRESS that the others can reach, or --host 127.0.0.1 for this machine alone",
            ) from error
        return str(probe.getsockname()[0])


def address_of(host: str, place: str = "--host") -> str:
    """The IP address of a name.

    Raises:
        UserError: it has none.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"{host!r} is no address: {error.strerror}",
            place=place,
            remedy="an address or a name of this machine that the others know (hostname -I lists its addresses)",
        ) from error
