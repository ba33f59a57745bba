"""The whole local state of an island on disk, so that a stopped run goes on exactly where it was.

One folder a member: `tensors.safetensors` (live parameters, anchors, outer states, residuals, optimizer) and
`member.json` (identity, watermarks, positions, random state). The JSON is written last and names the tensors' digest
and its own: a folder without it, or with another digest, is not a state.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from strategies.eager import Correction
from workers import messages as msg
from workers.member import FragmentState, MemberMachine, Pending
from workers.messages import Offer, Version
from workers.open_steps import OpenSteps
from workers.optim import InnerOptimizer, export_state, import_state
from workers.records import OfferId
from workers.replica import Replica
from workers.saved import LOCAL_META, LOCAL_SCHEMA, LOCAL_TENSORS, local_tensors, meta_text
from workers.sync import IslandSync
from workers.tensor_file import save_tensors

VECTORS = ("residual", "next_residual", "displacement", "gradients", "due", "aside")
SCHEDULE = ("total_steps", "marks", "sent_at", "due_in", "rounds")


def save_local(folder: Path, sync: IslandSync, model: nn.Module, optimizer: InnerOptimizer) -> None:
    """Write the state of an island between two steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCAL_META).unlink(missing_ok=True)
    with sync.changed:
        sync.replica.hold_displacement()
        tensors = {f"optimizer/{name}": value for name, value in export_state(optimizer, model).items()}
        tensors |= {f"live/{name}": value.detach().cpu() for name, value in model.state_dict().items()}
        tensors |= _replica_tensors(sync.replica)
        tensors["random/torch"] = torch.get_rng_state()
        meta = _machine_meta(sync)
    temporary = folder / (LOCAL_TENSORS + ".tmp")
    meta["tensors_digest"] = save_tensors(temporary, tensors)
    temporary.rename(folder / LOCAL_TENSORS)
    temporary = folder / (LOCAL_META + ".tmp")
    temporary.write_text(meta_text(meta))
    _sync_file(temporary)
    temporary.rename(folder / LOCAL_META)


def keep_local(folder: Path, sync: IslandSync, model: nn.Module, optimizer: InnerOptimizer) -> None:
    """The last act of an island that is stopped: its state on disk, and word of it; or word of why it is not there.

    A full disk costs the run the steps that this island has not had committed, and nothing else.
    """
    try:
        save_local(folder, sync, model, optimizer)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        sync.say(msg.FaultSeen(fault=msg.LOCAL_FAILED, detail=f"{folder}: {error}"))
        return
    versions = tuple(part.n for part in sync.replica.parts)
    sync.say(msg.Saved(name=sync.machine.name, versions=versions, local=True))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replica_tensors(replica: Replica) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for fragment, part in enumerate(replica.parts):
        out[f"anchor/{fragment}"] = part.anchor.cpu()
        for place, state in enumerate(part.states):
            out[f"state/{fragment}/{place}"] = state.cpu()
        for name in VECTORS:
            value = getattr(part, name)
            if value is not None:
                out[f"{name}/{fragment}"] = value.cpu()
        if part.correction is not None:
            out[f"ahead/{fragment}"], out[f"added/{fragment}"] = part.correction.ahead_N, part.correction.added_N
            out |= {f"ahead/{fragment}/{place}": state for place, state in enumerate(part.correction.states)}
    return out


def _machine_meta(sync: IslandSync) -> dict[str, Any]:
    machine, replica = sync.machine, sync.replica
    return {
        "schema": LOCAL_SCHEMA,
        "run_id": machine.run_id,
        "name": machine.name,
        "nonce": machine.nonce,
        "incarnation": machine.incarnation,
        "consumed": machine.consumed,
        "leases": machine.leases,
        "steps": machine.steps,
        "schedule": {name: getattr(sync.schedule, name) for name in SCHEDULE},
        "steps_done": list(sync.steps_done),
        "base_samples": sync.base_samples,
        "fragments": [
            {
                "n": state.n,
                "chain": state.chain,
                "watermark": state.watermark,
                "seq": state.seq,
                "late": state.late,
                "sent": replica.parts[fragment].sent,
                "pending": asdict(state.pending.offer) if state.pending else None,
            }
            for fragment, state in enumerate(machine.fragments)
        ],
    }


def load_local(
    folder: Path,
    meta: dict[str, Any],
    sync: IslandSync,
    model: nn.Module,
    optimizer: InnerOptimizer,
) -> None:
    """Put a saved state back, bit for bit, and remove it: from now on the process is ahead of it."""
    tensors = load_file(local_tensors(folder, meta))
    model.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("live/")})
    import_state(optimizer, model, {n[10:]: v for n, v in tensors.items() if n.startswith("optimizer/")})
    for fragment, part in enumerate(sync.replica.parts):
        part.anchor.copy_(tensors[f"anchor/{fragment}"])
        for place, state in enumerate(part.states):
            state.copy_(tensors[f"state/{fragment}/{place}"])
        for name in VECTORS:
            value = tensors.get(f"{name}/{fragment}")
            setattr(part, name, value.to(part.anchor.device) if value is not None else None)
        if f"ahead/{fragment}" in tensors:
            states = tuple(tensors[f"ahead/{fragment}/{place}"] for place in range(len(part.states)))
            like = part.anchor.device
            part.correction = Correction(
                tensors[f"ahead/{fragment}"].to(like),
                tuple(state.to(like) for state in states),
                tensors[f"added/{fragment}"].to(like),
            )
        saved = meta["fragments"][fragment]
        part.n, part.chain, part.sent = saved["n"], saved["chain"], saved["sent"]
    torch.set_rng_state(tensors["random/torch"])
    _restore_machine(sync.machine, meta)
    for name in SCHEDULE:
        setattr(sync.schedule, name, meta["schedule"][name])
    sync.steps_done = OpenSteps(meta["steps_done"])
    sync.base_samples = meta["base_samples"]
    if sync.copies is not None:
        sync.copies.begun = meta["incarnation"]
    (folder / LOCAL_META).unlink()


def _restore_machine(machine: MemberMachine, meta: dict[str, Any]) -> None:
    fragments = []
    for saved in meta["fragments"]:
        state = FragmentState(
            n=saved["n"], chain=saved["chain"], watermark=saved["watermark"], seq=saved["seq"], late=saved["late"]
        )
        if saved["pending"] is not None:
            offer = _offer(saved["pending"])
            member = f"{meta['name']}.{meta['incarnation']}"
            assert meta["incarnation"] is not None, f"{member} offered before it was a member"
            offer_id = OfferId(member=machine.member_id(meta["incarnation"]), seq=offer.seq)
            state.pending = Pending(offer=offer, id=offer_id, published=False)
        fragments.append(state)
    machine.restore(
        incarnation=meta["incarnation"],
        nonce=meta["nonce"],
        consumed=meta["consumed"],
        steps=meta["steps"],
        leases=[(start, stop) for start, stop in meta["leases"]],
        fragments=fragments,
    )


def _offer(saved: dict[str, Any]) -> Offer:
    return Offer(
        **{
            **saved,
            "base": Version(**saved["base"]),
            "ranges": tuple((a, b) for a, b in saved["ranges"]),
            "chunk_digests": tuple(saved["chunk_digests"]),
            "sumsq": tuple(saved["sumsq"]),
        }
    )
