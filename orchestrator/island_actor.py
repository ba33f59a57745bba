"""The Ray actor of one island: it trains on a thread of its own while it answers control calls."""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from faults.chaos import Chaos
from faults.plan import PlannedFault
from orchestrator.cluster.state import state_root
from orchestrator.log_shipping import read_piece
from orchestrator.processes import NAMESPACE, controller_name
from workers.context import IslandContext, IslandSpec, enter
from workers.data.placing import pack_here
from workers.messages import Batch, Envelope, News
from workers.records import Term
from workers.stack import allow_dumps, write_stack

if TYPE_CHECKING:
    from orchestrator.host import Handed  # the controller's: an island need not import it
    from workers.standby import Standby

# What a fault injector puts around an island: the context comes out with its calls wrapped. None in production.
ContextWrapper = Callable[[IslandContext], IslandContext]

NEWS_TIMEOUT_S = 10.0

island_log = logging.getLogger("atoll.island")


# Batches are delivered on a thread of their own, in order; whoever waits for the end holds a thread while it waits.
@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1, "watch": 64})
class IslandActor:
    """One island's process."""

    def __init__(
        self, spec: IslandSpec, nonce: str, token: str, log_file: str, wrap: ContextWrapper | None = None
    ) -> None:
        """Keeps the arguments; `begin` does the work."""
        self.spec, self.nonce, self.token, self.log_file, self.wrap = spec, nonce, token, log_file, wrap
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.context: IslandContext | None = None
        self.chaos: Chaos | None = None
        self.standby: Standby | None = None
        self.place: tuple[IslandSpec, str] | None = None
        self.waits = False
        self.chaos: Chaos | None = None

    @ray.method(concurrency_group="control")
    def stand_by(self) -> str:
        """Wait for a place (`workers/standby.py`); returns the id of this process's node."""
        self.waits = True
        node = str(ray.get_runtime_context().get_node_id())
        self._settle_in()
        allow_dumps()
        island_log.info("%s is process %d, and waits", self.spec.name, os.getpid())
        with _logged("the standby did not start"):
            context = self._make_context(node)
        threading.Thread(target=self._stand_by, args=(context,), name="train", daemon=True).start()
        return node

    def _stand_by(self, context: IslandContext) -> None:
        from workers.standby import Standby

        try:
            with _logged("the standby failed"):
                self.standby = Standby(context, lambda held, ready: _news(self.spec.run_id, self.nonce, held, ready))
                if self.place is not None:
                    self.standby.take_over()
                self.standby.wait()
                assert self.place is not None
                self.spec, self.log_file = self.place
                self._settle_in()
                island_log.info("%s is process %d, which waited as %s", self.spec.name, os.getpid(), context.spec.name)
                mine = replace(context, spec=self.spec)
                self._take(mine)
                assert self.context is not None
                with enter(self.context):
                    self.standby.train(self.context)
        finally:
            self.failure = sys.exc_info()[1]
            self.ended.set()

    @ray.method(concurrency_group="control")
    def take_place(self, spec: IslandSpec, log_file: str) -> None:
        """Become an island; `begin` then answers as for any other process."""
        self.place = (spec, log_file)
        if self.standby is not None:
            self.standby.take_over()

    @ray.method(concurrency_group="watch")
    def save_stack(self, path: str) -> None:
        """Write down where the threads of this process are: it hangs in something, and is going to be ended."""
        write_stack(self.spec.run_dir / "logs" / Path(path).name)

    @ray.method(concurrency_group="control")
    def begin(self) -> str:
        """Open the log, serve, and start the training thread; returns the id of this process's node. Idempotent."""
        node = str(ray.get_runtime_context().get_node_id())
        if self.context is not None or self.place is not None:
            return node
        self._settle_in()
        allow_dumps()
        island_log.info("%s is process %d on %s", self.spec.name, os.getpid(), platform.node())
        with _logged("the island did not start"):
            self._start(node)
        return node

    def _settle_in(self) -> None:
        """Logs and local state go into the run directory where this machine sees it, else into a folder of its own.

        A pack that is not on this machine gets a folder in its cache; shards come when they are needed. Raises
        DataError.
        """
        mine = own_run_dir(self.spec.run_dir)
        self.spec = replace(self.spec, run_dir=mine)
        log_to(mine / "logs" / Path(self.log_file).name)
        if self.spec.pack is not None:
            with _logged("the pack is not here and could not be asked for"):
                pack, on_demand = pack_here(self.spec.data, self.spec.pack, self._ask_pack_files)
                self.spec = replace(self.spec, pack=pack, on_demand=on_demand)

    def _ask_pack_files(self) -> dict[str, bytes]:
        controller = ray.get_actor(controller_name(self.spec.run_id), namespace=NAMESPACE)
        files: dict[str, bytes] = ray.get(controller.pack_files.remote(), timeout=NEWS_TIMEOUT_S)
        return files

    def _start(self, node: str) -> None:
        context = self._make_context(node)
        self._take(context)
        threading.Thread(target=self._train, name="train", daemon=True).start()

    def _take(self, context: IslandContext) -> None:
        """This context is the island's, with what faults go through around it."""
        self.chaos = Chaos(self.wrap(context) if self.wrap is not None else context)
        self.context = self.chaos.context

    def _make_context(self, node: str) -> IslandContext:
        """Everything that a process of the run needs before anybody knows whose it is."""
        import torch

        from workers.jobs import MemberStore
        from workers.memory import keep_heap
        from workers.transport.flight import FlightTransport

        keep_heap()
        torch.set_num_threads(self.spec.train.threads)
        host = ray.util.get_node_ip_address()
        store = MemberStore()
        transport = FlightTransport(
            store, host=host, token=self.token, num_connections=self.spec.connections,
            link_share=self.spec.link_share, link_bytes_per_s=self.spec.link_bytes_per_s,
        )  # fmt: skip
        transport.start()
        controller = ray.get_actor(controller_name(self.spec.run_id), namespace=NAMESPACE)
        return IslandContext(
            spec=self.spec,
            nonce=self.nonce,
            node=node,
            store=store,
            transport=transport,
            post=lambda envelope: _post(controller, envelope),
            clock=time.monotonic,
            num_sharing=_islands_here(node, self.spec.num_islands),
            region=_label_of(node, self.spec.strategy.near_label) if self.spec.strategy.topology == "near" else "",
            executor=ThreadPoolExecutor(max_workers=4, thread_name_prefix="sync"),
        )

    def _train(self) -> None:
        assert self.context is not None
        from workers.loops import run_builtin_loop, run_user_loop

        try:
            with _logged("the island failed"), enter(self.context):
                if self.spec.train.loop is not None:
                    run_user_loop(self.context)
                else:
                    run_builtin_loop(self.context)
        finally:
            self.failure = sys.exc_info()[1]
            self.ended.set()

    @ray.method(concurrency_group="control")
    def deliver(self, batch: Batch) -> None:
        """A batch from the controller."""
        if self.context is not None and self.context.deliver is not None:
            self.context.deliver(batch)

    @ray.method(concurrency_group="watch")
    def attach(self, term: Term) -> Handed | None:
        """The journal was lost: hand in this member's copy, and promise to obey `term` from now on."""
        if self.waits and self.place is None:
            return None
        if self.context is None or self.context.attach is None:
            return None, ()
        return self.context.attach(term)

    @ray.method(concurrency_group="watch")
    def wait(self, timeout_s: float) -> str | None:
        """How training ended: "" or why it failed; None if it has not after `timeout_s`.

        A caller learns of the process's death by this call.
        """
        if not self.ended.wait(timeout_s):
            return None
        return "" if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"

    @ray.method(concurrency_group="watch")
    def pid(self) -> int:
        """Of this process, for who wants to look at its stack when it does not answer any more."""
        return os.getpid()

    @ray.method(concurrency_group="watch")
    def has_log_at(self, probe: str) -> bool:
        """Leave a mark beside this process's log: who finds it shares the directory."""
        Path(probe).touch()
        return True

    @ray.method(concurrency_group="watch")
    def read_log(self, offset: int, num_bytes: int) -> bytes:
        """What this process's log has at an offset."""
        return read_piece(Path(self.log_file), offset, num_bytes)

    @ray.method(concurrency_group="watch")
    def die(self, signal_number: int) -> None:
        """Injected fault: this process sends itself a signal."""
        os.kill(os.getpid(), signal_number)

    def afflict(self, fault: PlannedFault) -> None:
        """Injected fault: it begins now, and ends by itself if it has a length."""
        if self.chaos is not None:
            self.chaos.apply(fault)


def _news(run_id: str, nonce: str, held: int, ready: bool) -> News | None:
    """What the controller has for a standby; None while it is not there (Ray restarts it)."""
    try:
        controller = ray.get_actor(controller_name(run_id), namespace=NAMESPACE)
        return ray.get(controller.standby_news.remote(nonce, held, ready), timeout=NEWS_TIMEOUT_S)
    except (RayActorError, GetTimeoutError, ValueError) as error:
        island_log.info("no news from the controller: %s", error)
        return None


def _islands_here(node: str, num_islands: int) -> int:
    """Islands that this machine has places for, which share its memory."""
    here = _node_entry(node).get("Resources", {})
    return max(min(int(here.get("atoll_worker", 1)), num_islands), 1)


def _label_of(node: str, label: str) -> str:
    """What a label of this machine says (`atoll join --label`); nothing where it has none of that name."""
    return str((_node_entry(node).get("Labels") or {}).get(label, ""))


def _node_entry(node: str) -> dict[str, Any]:
    return next((dict(entry) for entry in ray.nodes() if entry["NodeID"] == node), {})


def _post(controller: ActorHandle, envelope: Envelope) -> None:
    controller.receive.remote(envelope)


def own_run_dir(run_dir: Path) -> Path:
    """The run directory as this machine has it: the controller's where it is there, else one of this machine's own."""
    return run_dir if run_dir.is_dir() else state_root() / "runs" / run_dir.name


def log_to(path: Path) -> None:
    """Everything this process prints, native code included, goes to the member's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Whatever is raised in here is in the member's log, with its traceback, before it goes on."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            island_log.exception(what)
