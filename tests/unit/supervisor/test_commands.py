"""Commands are answered exactly once."""

from __future__ import annotations

from ascproxy.net.mailbox import Frame, Kind, Mailbox
from ascproxy.supervisor.commands import Commands


def test_each_command_is_answered_once_by_the_child_or_its_end() -> None:
    commands, answers = Commands(), []
    ours, theirs = Mailbox.pair()
    for name in ("a", "b", "c"):
        commands.send(3, ours, Frame(Kind.RELEASE), lambda reason, _, name=name: answers.append((name, reason)))
    first, second, _ = [theirs.receive() for _ in range(3)]
    assert first is not None and second is not None
    assert first.request != second.request
    commands.reply(Frame(Kind.DONE, second.request))
    commands.reply(Frame(Kind.DONE, second.request))
    commands.reply(Frame(Kind.FAILED, first.request, {"reason": "no"}))
    commands.fail(2)
    assert answers == [("b", None), ("a", "no")]
    commands.fail(3)
    assert answers[2:] == [("c", "the process exited")]


def test_what_cannot_be_sent_fails_at_once() -> None:
    commands, answers = Commands(), []
    commands.send(0, None, Frame(Kind.RELEASE), lambda reason, _: answers.append(reason))
    assert answers == ["its mailbox is full or closed"]
