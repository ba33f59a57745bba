"""Starting a run on Ray and watching it: what `atoll train` and `atoll demo` do after everything was checked."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults.plan import PlannedFault
from orchestrator.attach import note_address
from orchestrator.build import num_islands
from orchestrator.cluster.run_tokens import run_token
from orchestrator.cluster.tokens import new_token
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.lean_ray import lean_start
from orchestrator.progress import Progress
from orchestrator.resume import check_resumable
from orchestrator.room import check_room, look, who_is_waited_for
from orchestrator.rundir import RunDir
from orchestrator.step_guess import StepGuess
from orchestrator.summary import load_summary
from orchestrator.waiting import waiting
from orchestrator.watch import interrupts_afterwards, watch
from strategies.codecs.backends import resolve_backend

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from faults.lab.schedule import LinkChange
    from orchestrator.cluster.state import ClusterState
    from orchestrator.config import RunConfig
    from orchestrator.island_actor import ContextWrapper
    from orchestrator.prepare import Prepared
    from orchestrator.summary import Summary

KNOCK_S = 5.0
SETTING = "run.address"
EXIT = {"done": 0, "failed": 1, "stopped": 3}
# Set to 0, a Ray of our own listens on 127.0.0.1 alone: no firewall, no changed address, nobody else gets in.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
OBJECT_STORE_BYTES = 100 * 1024 * 1024
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    # Ray's housekeeping, which nobody reads in a cluster of one machine: 2 to 3 % of a core that training can use.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Drops the line that Ray prints on the driver's terminal whenever a process dies: the run says it in its own words.
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^(A worker died or was killed|The node with node id)",
    "MALLOC_ARENA_MAX": "1",  # see workers.memory
    # Ray gives its workers the priority 15, which starves training and heartbeats where anything else runs.
    "RAY_worker_niceness": "0",
}


def train(prepared: Prepared, run_dir: Path, *, resume: bool, as_json: bool) -> int:
    """Run to the end (or to Ctrl-C), say how it ended and return the exit code; the caller holds the lock."""
    summary = run_to_end(prepared, run_dir, resume=resume, quiet=as_json)
    if as_json:
        print(summary.model_dump_json(indent=2))
    elif summary.exit_reason == "failed":
        print(f"error: the run failed: {summary.error}", file=sys.stderr)
    return EXIT[summary.exit_reason]


def run_to_end(prepared: Prepared, run_dir: Path, *, resume: bool, quiet: bool) -> Summary:
    """Run to the end (or to Ctrl-C) and write the report; the caller holds the directory's lock."""
    config = prepared.config
    for note in prepared.notes:
        _say(note)
    _, warning = resolve_backend(config.codec.backend)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if resume and config.run.address is None:  # elsewhere the run may be going on, see `RaySession.start`
        with waiting("looking at what can be resumed"):
            found = check_resumable(RunDir(run_dir), snapshots=config.run.snapshots)
        _say(found)
    RunDir(run_dir).record(config.to_toml())
    session, guess = RaySession(config), StepGuess(config, prepared.pack, run_dir.resolve().parent)
    with ExitStack() as stack:
        with waiting("starting Ray"), interrupts_afterwards():
            if not quiet:
                guess.start()
            stack.enter_context(session)
        plan: tuple[PlannedFault | LinkChange, ...] = (*prepared.faults, *prepared.links)
        known = None if quiet else guess
        summary = session.run(run_dir.resolve(), prepared.pack, plan, resume=resume, guess=known)
    if summary.tokens_committed:
        from orchestrator.report.build import build_report

        with waiting("writing the report"):
            build_report(run_dir)
    return summary


def _say(note: str) -> None:
    if note:
        print(f"note: {note}", file=sys.stderr)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def python_path() -> list[str]:
    """Where the processes of a run look for modules first: as this process, without what is installed."""
    installed = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
    own = [Path(entry or ".").resolve() for entry in sys.path]
    own = [path for path in own if path.is_dir() and not any(path.is_relative_to(folder) for folder in installed)]
    paths = [Path.cwd(), *own, Path(__file__).resolve().parents[1]]
    return list(dict.fromkeys(map(str, paths)))


def set_ray_environment(address: str | None) -> None:
    """What Ray reads from the environment; `address`: of the cluster that is entered, None = one of our own.

    How somebody else's cluster is entered (`RAY_AUTH_MODE=token`) is said by whoever runs this, and stays as it is.
    """
    given = {} if address is None else {key: os.environ[key] for key in ("RAY_AUTH_MODE",) if key in os.environ}
    os.environ.update(RAY_ENVIRONMENT | given)


class RaySession:
    """A connection to Ray: a cluster of its own on this machine, or the one at `run.address`."""

    def __init__(self, config: RunConfig) -> None:
        """Nothing is started before the session is entered."""
        self.config = config
        self.connected_before = False
        self.places: int | None = None
        self.controller: ActorHandle[Any] | None = None
        self.run_id = ""
        self.run_dir: Path | None = None

    def __enter__(self) -> RaySession:
        """Start or join the cluster; raises `ClusterUnreachable`."""
        set_ray_environment(self.config.run.address)
        if self.config.metrics.ray:
            os.environ["RAY_enable_metrics_collection"] = "1"
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*python_path(), *inherited]))
        known = None
        if self.config.run.address is None:
            os.environ[LOOPBACK_ONLY] = "0"
        else:
            known = enter_cluster(self.config.run.address)
        import ray

        if ray.is_initialized():
            self.connected_before = True
            return self
        self._connect(known)
        return self

    def _connect(self, known: ClusterState | None) -> None:
        import ray

        from orchestrator.processes import NAMESPACE, WORKER_RESOURCE

        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "logging_level": "ERROR",
            "log_to_driver": False,
            "configure_logging": False,
        }
        if self.config.run.address is None:
            slots = num_islands(self.config) + self.config.run.standby + 2
            options |= {
                "address": "local",  # never a Ray that happens to run here
                "num_cpus": slots,  # so many processes Ray starts beforehand, beside its own; nothing else asks for it
                "resources": {WORKER_RESOURCE: slots},
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        elif known is not None:
            # Beside other nodes on this machine Ray would take any of them.
            options |= {"address": known.gcs_address, "_node_ip_address": known.node_ip}
        else:
            options["address"] = self.config.run.address
        own = self.config.run.address is None
        try:
            with lean_start(exports_metrics=self.config.metrics.ray) if own else nullcontext():
                ray.init(**options)
        except ConnectionError as error:
            raise no_answer(self.config.run.address, str(error)) from error

    def find_again(self) -> ActorHandle[Any] | None:
        """The controller, by a new connection: the old one was by way of a node that is gone, perhaps the head.

        None while there is no cluster, or no controller in it.
        """
        import ray

        assert self.config.run.address is not None
        ray.shutdown()
        try:
            self._connect(enter_cluster(self.config.run.address))
        except ClusterUnreachable:
            return None
        self.controller = _find_controller(self.run_id)
        return self.controller

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """End what this session started; a connection that was there before stays.

        On a cluster whose controller was lost from sight nothing is ended: the run goes on, or comes back.
        """
        import ray

        out_of_sight = kind is not None and issubclass(kind, ClusterUnreachable) and self.config.run.address is not None
        with interrupts_afterwards():
            try:
                if self.controller is not None and not out_of_sight and ray.is_initialized():
                    from orchestrator.processes import end_processes

                    end_processes(self.run_id)
                    if self.run_dir is not None:
                        RunDir(self.run_dir).cluster_file.unlink(missing_ok=True)
            finally:
                if not self.connected_before:
                    ray.shutdown()

    def start(
        self,
        run_dir: Path,
        pack: Path | None,
        faults: Sequence[PlannedFault | LinkChange],
        *,
        resume: bool,
        wrap: ContextWrapper | None = None,
    ) -> ActorHandle[Any]:
        """Create the run's controller, which starts the islands. `wrap`: see `faults.inject`.

        A run that is resumed may be going on: its controller outlives whoever started it, and is taken over then.
        Raises UserError where the cluster can never have all its islands.
        """
        import ray

        from orchestrator.processes import NAMESPACE, controller_name, this_machine

        run_id, self.run_dir = run_dir.name, run_dir
        self.run_id = run_id
        alive = _find_controller(run_id)
        room = look(self.config.run.labels)
        self.places = room.places
        if alive is not None and resume:
            self.controller = alive
            return alive
        if alive is not None:
            raise UserError(
                f"a run called {run_id!r} goes on in this cluster, or has just ended",
                place=str(run_dir),
                remedy="another --run-dir: the name of the folder is the run's name in the cluster",
            )
        check_room(self.config, room)
        if self.config.run.address is not None:  # elsewhere nobody else trains, and Ray tells what is free seconds late
            _say(who_is_waited_for(self.config, room))
        if resume:
            elsewhere = self.config.run.address is not None
            found = check_resumable(RunDir(run_dir), snapshots=self.config.run.snapshots, elsewhere=elsewhere)
            if elsewhere:  # else it was said before Ray was started
                _say(found)
        salt = secrets.token_hex(16)
        self._say_where(run_dir, salt)
        options = {"name": controller_name(run_id), "namespace": NAMESPACE, "lifetime": "detached"}
        arguments = (self.config.to_tables(), run_id, str(run_dir), None if pack is None else str(pack))
        token = run_token(cluster_token() or new_token(), run_id, salt)
        if self.config.pipeline.stages is not None:
            from orchestrator.pipeline.controller import PipelineActor
            from orchestrator.prepare import layer_table
            from workers.pipeline.layer_table import read_table

            assert pack is not None, "a pipeline has a pack"
            if read_table(run_dir) is None and (table := layer_table(self.config, pack)) is not None:
                table.write(run_dir)

            shell = PipelineActor.options(**options, resources=this_machine())  # type: ignore[attr-defined]
            self.controller = shell.remote(*arguments, token, list(faults), resume)
        else:
            from orchestrator.actors import ControllerActor

            shell = ControllerActor.options(**options, resources=this_machine())  # type: ignore[attr-defined]
            self.controller = shell.remote(*arguments, token, list(faults), resume, wrap)
        note_address(run_dir)
        ray.get(self.controller.begin.remote(), timeout=60)
        return self.controller

    def _say_where(self, run_dir: Path, salt: str) -> None:
        """Leave in the run's directory where its Ray is, and what its token is made with beside the cluster's."""
        import ray

        from orchestrator.log_files import write_cluster_file

        context = ray.get_runtime_context()
        node = next(n for n in ray.nodes() if n["NodeID"] == context.get_node_id())  # type: ignore[no-untyped-call]
        values = {"address": context.gcs_address, "node_ip": node["NodeManagerAddress"], "run": run_dir.name}
        how = {"local": self.config.run.address is None, "salt": salt}
        write_cluster_file(RunDir(run_dir).cluster_file, {**values, **how})

    def run(
        self,
        run_dir: Path,
        pack: Path | None,
        faults: Sequence[PlannedFault | LinkChange],
        *,
        resume: bool,
        guess: StepGuess | None,
    ) -> Summary:
        """Start, watch, and return the summary. `guess`: of a step's length, for who reads along; None: nobody does."""
        with waiting("starting the controller"), interrupts_afterwards():
            controller = self.start(run_dir, pack, faults, resume=resume)
        step = None if guess is None else guess.result()
        with Progress(self.config, quiet=guess is None, places=self.places, step=step) as progress:
            # A Ray of our own ends with the run, and a connection of somebody else's is not ours to give up.
            own = self.config.run.address is None or self.connected_before
            watch(controller, progress, None if own else self.find_again)
        return load_summary(run_dir)


def _find_controller(run_id: str) -> ActorHandle[Any] | None:
    import ray

    from orchestrator.processes import NAMESPACE, controller_name

    try:
        return ray.get_actor(controller_name(run_id), namespace=NAMESPACE)
    except ValueError:
        return None


def enter_cluster(address: str, *, known: bool = True, asked: str = SETTING) -> ClusterState | None:
    """Set the environment for a cluster: one that this machine is part of, one whose token is given, or an open one.

    Without `known` it is a Ray that a run of this machine started for itself: only whether it listens is looked at.
    `asked`: the setting or option that the address is from.

    Raises:
        ClusterUnreachable: nobody answers there.
        UserError: this is no address.
    """
    if not known:
        _knock(address, asked)
        return None
    from orchestrator.cluster.ray_node import DROPPED, cluster_environment
    from orchestrator.cluster.state import AUTO, find_cluster
    from orchestrator.cluster.tokens import TOKEN_VARIABLE

    state = find_cluster(address)
    if state is None and address == AUTO:
        raise ClusterUnreachable("this machine is in no cluster", place=f"{asked} = 'auto'", remedy="atoll up")
    _knock(state.gcs_address if state is not None else address, asked)
    if state is not None:
        for key in DROPPED:
            os.environ.pop(key, None)
        os.environ.update(cluster_environment(state.token_file, wan=state.wan))
    elif token := os.environ.get(TOKEN_VARIABLE):
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    if "ray" in sys.modules:
        reread_environment()
    return state


def cluster_token() -> str | None:
    """What the cluster that this process has entered asks for; None where Ray asks for nothing."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    loader = AuthenticationTokenLoader.instance()
    return str(loader.get_raw_token()) if loader.has_token() else None


def reread_environment() -> None:
    """Ray looked at its environment when it was imported; what is connected already stays as it is."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if not ray.is_initialized():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _knock(address: str, asked: str) -> None:
    """Ray tries for minutes to reach a cluster that is not there: see whether anything listens at `host:port` first."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UserError(f"{address!r} is no address of a Ray cluster", place=asked, remedy="HOST:PORT, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except OSError as error:
        raise no_answer(address, str(error), asked) from error


def no_answer(address: str | None, why: str, asked: str = SETTING) -> ClusterUnreachable:
    """The error for a Ray that does not answer."""
    here = f"start one there, or remove {SETTING} to run on this machine"
    remedy = (
        here if asked == SETTING else "atoll up there, or another address; atoll doctor looks at what is in the way"
    )
    return ClusterUnreachable(f"no Ray cluster answers at {address!r}: {why}", place=asked, remedy=remedy)


def demo(prepared: Prepared, run_dir: Path, *, as_json: bool) -> int:
    """Train, then show what came of it; the caller holds the directory's lock."""
    from rich.console import Console

    from orchestrator.artifacts import sample
    from orchestrator.report.console import console_table

    console = Console(stderr=as_json)
    code = train(prepared, run_dir, resume=False, as_json=as_json)
    if code == 0:
        console.rule("a sample before training, and after")
        for when in ("genesis", None):
            with waiting("writing a sample"):
                text = sample(run_dir, "def ", max_new_tokens=120, temperature=0.7, seed=0, snapshot=when)
            console.print(_glyphs(text) if when else text, markup=False, highlight=False)
            console.rule()
        console.print(console_table(load_summary(run_dir)))
        console.print(f"report: {run_dir / 'report.html'}", highlight=False)
    return code


def _glyphs(noise: str, num: int = 60) -> str:
    """The beginning of what an untrained model writes, on one line: bytes that are no text show as dots."""
    return "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in noise[:num])
