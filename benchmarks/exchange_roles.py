"""The processes of `benchmarks/exchange.py`; each prints one JSON object at its end. Nothing here is used elsewhere.

    controller   the production `Host` on a socket; members' envelopes come in, batches go out
    peer         the production `IslandSync`, `Replica` and `FlightTransport`, with a loop that computes nothing
    flight       plain Arrow Flight, the same bytes both ways at once over 8 connections
    gloo         torch's all-reduce of the same tensor

All processes run on one machine, also where they are on two nodes of a lab, so their monotonic clocks are one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import torch

AUTHKEY = b"benchmark"
NUM_CONNECTIONS = 8
BATCH_BYTES = 1 << 20
END_S = 600.0


def controller(options: argparse.Namespace) -> dict[str, Any]:
    """Two members, `rounds` exchanges; ends when the run does."""
    from orchestrator.desk import RunPlan
    from orchestrator.host import Host
    from orchestrator.settings import ExchangeConfig
    from strategies.config import StrategyConfig

    plan = RunPlan(
        run_id="exchange", islands=("island-0", "island-1"), total_samples=2 * options.rounds, seq_len=1,
        exchange=ExchangeConfig(quorum=1.0, timeout_s=END_S, progress_timeout_s=END_S, suspect_s=60.0),
        strategy=StrategyConfig(inner_steps=1), eval_every=2.0, start_timeout_s=120.0, snapshot_every_s=1e9,
        replace_dead=False, max_restarts=0,
    )  # fmt: skip
    members: dict[str, Connection] = {}
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def deliver(batch: Any) -> None:
        with suppress(OSError):  # it has what it came for, and is gone
            members[batch.name].send(batch)

    with tempfile.TemporaryDirectory() as folder:
        host = Host(
            plan=plan, run_dir=Path(folder) / "run", controller="benchmark", clock=time.monotonic,
            deliver=deliver, spawn=lambda name, why: None,
            end=lambda name, nonce, save_stack: None,
        )  # fmt: skip
        (Path(folder) / "run").mkdir()
        host.open()
        with Listener((options.host, 0), authkey=AUTHKEY) as listener:
            print(listener.address[1], flush=True)
            for _ in plan.islands:
                connection = _at_once(listener.accept())
                members[connection.recv()] = connection
                threading.Thread(target=_read, args=(connection, inbox.put), daemon=True).start()
            deadline_s = time.monotonic() + END_S
            while host.finished is None and time.monotonic() < deadline_s:
                try:
                    host.receive(inbox.get(timeout=0.05))
                except queue.Empty:
                    host.tick()
            for connection in members.values():
                connection.close()
        reason = host.finished.reason if host.finished is not None else "it did not end"
        host.close()
    return {"reason": reason}


def _at_once(connection: Connection) -> Connection:
    """Without Nagle's algorithm, as gRPC's connections are: a message does not wait until the last one is confirmed."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _read(connection: Connection, put: Any) -> None:
    while True:
        try:
            put(connection.recv())
        except (EOFError, OSError):
            return


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """One member; returns when each of its offers was made, each version was applied, and the bytes sent."""
    from strategies.config import CodecConfig, StrategyConfig
    from strategies.fragments import TensorSpec, default_chunk_values, plan_fragments
    from strategies.registry import build_strategy, warm_up
    from workers import messages as msg
    from workers.actions import EvaluateNow, Finished, SaveNow, TrainOn, WaitFor
    from workers.config import TrainConfig
    from workers.jobs import MemberStore
    from workers.member import MemberMachine
    from workers.memory import keep_heap
    from workers.replica import Replica
    from workers.sync import IslandSync, SyncSettings
    from workers.transport.flight import FlightTransport

    keep_heap()
    store = MemberStore()
    transport = FlightTransport(store, host=options.host, token="benchmark", num_connections=NUM_CONNECTIONS)
    transport.start()
    values = torch.from_numpy(np.random.default_rng(options.rank).normal(size=options.params).astype(np.float32))
    strategy = build_strategy(
        StrategyConfig(inner_steps=1), CodecConfig(name=options.codec), lr_at=lambda progress: 1e-3, train=TrainConfig()
    )
    for codec in (strategy.codec, strategy.result_codec):
        warm_up(codec)
    specs = plan_fragments(
        [TensorSpec(name="p", shape=(options.params,))], num_fragments=1, pattern="strided",
        chunk_values=options.chunk or default_chunk_values(options.params, strategy.codec.block),
    )  # fmt: skip
    replica = Replica(specs=specs, strategy=strategy, tensors={"p": values}, total_samples=2 * options.rounds)
    name = f"island-{options.rank}"
    machine = MemberMachine(
        run_id="exchange", name=name, nonce=f"{name}-benchmark", num_chunks=[spec.num_chunks for spec in specs],
        info=msg.ProcessInfo(address=transport.address, node=name, weight=1, batch_size=1),
    )  # fmt: skip
    connection = _at_once(Client((options.controller, options.port), authkey=AUTHKEY))
    connection.send(name)
    lock = threading.Lock()

    def post(envelope: msg.Envelope) -> None:
        with lock, suppress(OSError):  # the controller ends with the run
            connection.send(envelope)

    sync = IslandSync(
        machine=machine, replica=replica, store=store, transport=transport, post=post, clock=time.monotonic,
        settings=SyncSettings(
            batch_size=1, timeout_s=END_S, wait_s=END_S, heartbeat_s=0.2, bound_rounds=4.0,
            total_samples=2 * options.rounds,
        ),
        executor=ThreadPoolExecutor(4),
    )  # fmt: skip
    threading.Thread(target=_read, args=(connection, sync.deliver), daemon=True).start()
    sync.start()
    offered: dict[int, float] = {}
    applied: dict[int, float] = {}
    state, deadline_s = machine.fragments[0], time.monotonic() + END_S
    finished = False
    while time.monotonic() < deadline_s and not (finished and len(applied) >= options.rounds):
        action = sync.boundary()
        state = machine.fragments[0]
        now = time.monotonic()
        if state.n > 0:
            applied.setdefault(state.n, now)
        if state.pending is not None:
            offered.setdefault(state.n, now)
        match action:
            case TrainOn(ranges=todo):
                values.mul_(1.001)
                sync.stepped(sum(stop - start for start, stop in todo))
            case WaitFor(timeout_s=timeout_s):
                sync.wait(timeout_s)
            case EvaluateNow(samples=samples):
                sync.say(msg.Evaluated(versions=(state.n,), samples=samples, val_loss=None))
            case SaveNow(order=order):
                sync.say(msg.Saved(name=order.name, versions=(state.n,), local=order.local))
            case Finished():
                finished = True
    digest = replica.digest(0)
    threading.Event().wait(1.0)  # the other one may still fetch from here
    sync.close()
    sent = transport.bytes_sent
    transport.stop()
    return {"offered": offered, "applied": applied, "bytes_sent": sent, "digest": digest}


class PlainServer(fl.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    """Flight as its manual shows it: as many bytes as the ticket says, in batches of 1 MiB."""

    def __init__(self, host: str) -> None:
        self._batch = pa.record_batch(
            [pa.array(np.random.default_rng(0).integers(0, 256, BATCH_BYTES, dtype=np.uint8))], names=["bytes"]
        )
        super().__init__(f"grpc+tcp://{host}:0")

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
        """Stream that many bytes."""
        del context
        left = int(ticket.ticket)
        batches = []
        while left > 0:
            batches.append(self._batch.slice(0, min(left, BATCH_BYTES)))
            left -= BATCH_BYTES
        return fl.RecordBatchStream(pa.Table.from_batches(batches, self._batch.schema))


def flight(options: argparse.Namespace) -> dict[str, Any]:
    """Serve, and fetch as many bytes from the other at the same time; the address of the other comes on stdin."""
    server = PlainServer(options.host)
    print(server.port, flush=True)
    other = sys.stdin.readline().strip()
    private = [("grpc.use_local_subchannel_pool", 1)]
    clients = [fl.FlightClient(other, generic_options=private) for _ in range(NUM_CONNECTIONS)]
    times = []
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        for num_bytes in [max(options.bytes // 4, 1), *[options.bytes] * options.rounds]:
            share = str(-(-num_bytes // NUM_CONNECTIONS)).encode()
            print("ready", flush=True)
            sys.stdin.readline()
            begin_s = time.monotonic()
            list(pool.map(lambda client, share=share: _drain(client, share), clients))  # type: ignore[misc]
            times.append((begin_s, time.monotonic()))
    print("ready", flush=True)
    sys.stdin.readline()
    server.shutdown()
    return {"times": times[1:]}


def _drain(client: fl.FlightClient, ticket: bytes) -> None:
    for _ in client.do_get(fl.Ticket(ticket)):
        pass


def gloo(options: argparse.Namespace) -> dict[str, Any]:
    """All-reduces of the same tensor, after one that warms up."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://{options.controller}:{options.port}", rank=options.rank, world_size=2,
        timeout=timedelta(seconds=END_S),
    )  # fmt: skip
    values = torch.ones(options.params)
    times = []
    for _ in range(options.rounds + 1):
        dist.barrier()
        begin_s = time.monotonic()
        dist.all_reduce(values)
        times.append((begin_s, time.monotonic()))
    dist.barrier()
    dist.destroy_process_group()
    return {"times": times[1:]}


def main() -> int:
    """Play one role."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["controller", "peer", "flight", "gloo"])
    parser.add_argument("--host", default="127.0.0.1", help="own address")
    parser.add_argument("--controller", default="127.0.0.1", help="address of the controller, or of rank 0")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--params", type=int, default=50_000_000)
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--chunk", type=int, default=0, help="values of a chunk; 0 = as in a run")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    role = {"controller": controller, "peer": peer, "flight": flight, "gloo": gloo}[options.role]
    print(json.dumps(role(options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
