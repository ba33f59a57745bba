"""The accumulator's promises and the trainer's machine, event by event."""

from __future__ import annotations

import pytest

from workers.pipeline.accumulator import Accumulator, Begin, cover
from workers.pipeline.microbatches import (
    Announced,
    AskFence,
    Command,
    Committed,
    Event,
    Fenced,
    Microbatches,
    Refused,
    Release,
    Replied,
    Send,
    StageDone,
    StepOpened,
    Tick,
    Unreachable,
    Withdraw,
    Withdrawn,
)
from workers.pipeline.router import Router


def test_a_microbatch_counts_once() -> None:
    peer = Accumulator()
    assert peer.begin(0, 5, attempt=1) is Begin.RUN
    assert peer.begin(0, 5, attempt=1) is Begin.RUNNING
    assert peer.finish(0, 5)
    assert peer.begin(0, 5, attempt=2) is Begin.DONE
    assert not peer.finish(0, 5)
    assert peer.offer(0) == (5,)


def test_not_done_is_a_promise_for_what_is_under_way_too() -> None:
    peer = Accumulator()
    assert not peer.withdraw(0, 5, attempt=3)
    assert peer.begin(0, 5, attempt=3) is Begin.WITHDRAWN, "a late request is refused"
    assert peer.begin(0, 5, attempt=4) is Begin.RUN, "a new attempt is not"
    assert not peer.withdraw(0, 5, attempt=4)
    assert not peer.finish(0, 5), "one that ran was promised away"
    assert peer.offer(0) == ()


def test_other_versions_fences_and_drains_refuse() -> None:
    peer = Accumulator(version=2)
    assert [peer.begin(step, 0, attempt=1) for step in (1, 3)] == [Begin.OTHER_VERSION] * 2
    peer.begin(2, 0, attempt=1)
    peer.finish(2, 0)
    peer.drain()
    assert peer.begin(2, 1, attempt=2) is Begin.DRAINING and not peer.is_empty
    peer.fence(2)
    assert (peer.begin(2, 0, attempt=3), peer.offer(2)) == (Begin.FENCED, ())
    assert peer.is_empty
    peer.commit(2)
    peer.commit(2)
    assert peer.version == 3
    delayed = Accumulator(version=2, num_open_steps=2)
    assert [delayed.begin(step, 0, attempt=1) for step in (2, 3, 4)] == [Begin.RUN, Begin.RUN, Begin.OTHER_VERSION]


def test_a_refusal_is_a_promise_for_copies_of_the_request() -> None:
    peer = Accumulator()
    assert peer.begin(1, 5, attempt=7) is Begin.OTHER_VERSION, "the peer is a commit behind"
    peer.commit(0)
    assert peer.begin(1, 5, attempt=7) is Begin.WITHDRAWN, "a doubled message: its trainer has gone elsewhere"
    assert peer.begin(1, 5, attempt=8) is Begin.RUN


def test_a_roster_is_a_disjoint_cover_or_says_why_not() -> None:
    assert cover({"a": [0, 2], "b": [1]}, range(3)).exact
    lacks = cover({"a": [0, 1], "b": [1, 9]}, range(3))
    assert (lacks.missing, lacks.doubled, lacks.foreign) == ((2,), (1,), (9,))


class Trainer:
    """Two stages, two peers each, and a list of what the machine wants."""

    def __init__(self, *, num_stages: int = 2, microbatches: int = 1, max_in_flight: int = 1) -> None:
        self.machine = Microbatches(
            num_stages=num_stages, router=Router(trainer="t"), max_in_flight=max_in_flight, forward_timeout_s=30
        )
        self.now_s = 0.0
        for stage in range(num_stages):
            for copy in "ab":
                self.tell(Announced(peer=f"{copy}{stage}", stage=stage, announcement=1))
        self.sent = self.tell(StepOpened(step=0, microbatches=tuple(range(microbatches))))

    def tell(self, event: Event) -> list[Command]:
        return self.machine.handle(event, self.now_s)

    def tick(self, after_s: float) -> list[Command]:
        self.now_s += after_s
        return self.tell(Tick())

    def one(self, commands: list[Command]) -> Send:
        (command,) = commands
        assert isinstance(command, Send)
        return command

    def reply(self, send: Send) -> list[Command]:
        return self.tell(Replied(call=send.call, seconds=1.0))


def test_forward_then_loss_then_backward_then_release() -> None:
    trainer = Trainer(num_stages=3)
    send, path = trainer.one(trainer.sent), []
    done: list[Command] = []
    while not done or isinstance(done[-1], Send) or len(path) < 5:
        path.append((send.call.direction, send.call.stage))
        done = trainer.reply(send)
        if not any(isinstance(command, Send) for command in done):
            break
        send = next(command for command in done if isinstance(command, Send))
    assert path == [("forward", 0), ("forward", 1), ("backward", 2), ("backward", 1), ("backward", 0)]
    assert [command.stage for command in done if isinstance(command, StageDone)] == [0]
    assert trainer.machine.num_kept == 4
    assert trainer.tell(Committed(stage=2, step=0)) + trainer.tell(Committed(stage=0, step=0)) == []
    assert trainer.tell(Committed(stage=1, step=0)) == [Release(step=0)]
    assert trainer.machine.num_kept == 0


def at_backward() -> tuple[Trainer, Send]:
    trainer = Trainer()
    send = trainer.one(trainer.reply(trainer.one(trainer.sent)))
    assert (send.call.direction, send.call.stage) == ("backward", 1)
    return trainer, send


def test_a_forward_that_timed_out_goes_elsewhere_at_once_and_its_late_reply_is_stale() -> None:
    trainer = Trainer()
    first = trainer.one(trainer.sent)
    second = trainer.one(trainer.tick(31))
    assert second.call.peer != first.call.peer and second.call.stage == 0
    assert trainer.reply(first) == [] and trainer.machine.counts["stale answers"] == 1


def test_a_backward_that_timed_out_is_withdrawn_first() -> None:
    trainer, send = at_backward()
    assert trainer.tick(76) == [Withdraw(call=send.call)]
    again = trainer.one(trainer.tell(Withdrawn(call=send.call, done=False)))
    assert again.call.peer != send.call.peer and again.call.attempt > send.call.attempt


def test_a_backward_that_was_done_after_all_counts_where_it_is() -> None:
    trainer, send = at_backward()
    trainer.tick(76)
    done, following = trainer.tell(Withdrawn(call=send.call, done=True))
    assert following == StageDone(step=0, stage=1, counted=((0, send.call.peer),))
    assert isinstance(done, Send) and done.call.stage == 0


@pytest.mark.parametrize("how", ["silent", "unreachable"])
def test_without_an_answer_only_a_fence_sends_a_backward_elsewhere(how: str) -> None:
    trainer, send = at_backward()
    if how == "silent":
        trainer.tick(76)
        asked = trainer.tick(31)
    else:
        asked = trainer.tell(Unreachable(call=send.call, reason="it died"))
    assert [type(command) for command in asked] == [AskFence]
    assert [type(command) for command in trainer.tick(31)] == [AskFence], "asked again, never sent"
    again = trainer.one(trainer.tell(Fenced(peer=send.call.peer, step=0)))
    assert again.call.peer != send.call.peer


def test_what_a_fenced_peer_had_counted_is_computed_again_once_and_reported_again() -> None:
    trainer, send = at_backward()
    first = trainer.reply(send)
    assert any(isinstance(command, StageDone) for command in first)
    again = trainer.one(trainer.tell(Fenced(peer=send.call.peer, step=0)))
    assert (again.call.direction, again.call.stage) == ("backward", 1)
    assert trainer.tell(Fenced(peer=send.call.peer, step=0)) == []
    assert trainer.reply(again) == [StageDone(step=0, stage=1, counted=((0, again.call.peer),))]


def test_a_refusal_is_tried_elsewhere_after_a_pause_and_never_in_a_loop() -> None:
    trainer, send = at_backward()
    assert trainer.tell(Refused(call=send.call, reason="other version")) == []
    again = trainer.one(trainer.tick(0.5))
    assert again.call.peer != send.call.peer
    trainer.tell(Refused(call=again.call, reason="other version"))
    assert trainer.tick(0.5) == [], "both were asked: a pause"
    assert trainer.one(trainer.tick(0.5)).call.stage == 1


def test_each_timeout_that_was_too_short_doubles_the_next() -> None:
    trainer = Trainer()
    trainer.one(trainer.sent)
    for waited_s in (30, 60, 120):
        assert trainer.tick(waited_s - 1) == [], f"gave up before {waited_s} s"
        again = trainer.tick(1)
        if not again:  # both peers were asked: a pause, and both are banned until they are announced
            for copy in "ab":
                announcement = 1 + waited_s
                again = again or trainer.tell(Announced(peer=f"{copy}0", stage=0, announcement=announcement))
            again = again or trainer.tick(0.5)
        assert trainer.one(again).call.stage == 0


def test_microbatches_in_flight_are_bounded() -> None:
    trainer = Trainer(microbatches=7, max_in_flight=3)
    assert len(trainer.sent) == 3 == trainer.machine.num_in_flight
