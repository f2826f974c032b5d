"""Secure sums by files, under faults, in virtual time: every sum is exact or given up, and silos tell no more."""

import numpy as np
import pytest
from support import simulated_sums
from support.faulty_folder import HARSH, NONE, Faults, World
from support.simulated_sums import survive

from fedmpi.errors import ExchangeError
from fedmpi.files import names
from fedmpi.files.envelope import packed, unpacked
from fedmpi.files.line import File
from fedmpi.jobs.masking import ASK, LEAVES, Member, Part
from fedmpi.secure.protocol import Collector, Party

NUM = 15_000  # operations


@pytest.fixture(autouse=True)
def listens(monkeypatch):
    """Every answer of every silo is noted, by the sum that it is about."""
    real, truths = Party.answer, []
    made = simulated_sums.Truth.__init__

    def init(self, world):
        made(self, world)
        truths.append(self)

    def answer(self, round, survivors):
        found = real(self, round, survivors)
        for truth in truths[-1:]:
            truth.answered(self, survivors, found)
        return found

    monkeypatch.setattr(simulated_sums.Truth, "__init__", init)
    monkeypatch.setattr(Party, "answer", answer)


def test_without_faults_every_sum_is_of_all():
    truth = survive(World(1, NONE, most_operations=NUM))
    assert len(truth.came) > 20 and not truth.given_up
    assert all(len(silos) == 5 for silos in truth.came.values())


@pytest.mark.parametrize("faults", [Faults(), HARSH, Faults(stale_listing_s=30.0)], ids=["usual", "harsh", "stale"])
@pytest.mark.parametrize("seed", [1, 2])
def test_sums_are_exact_or_given_up(faults, seed):
    world = World(seed, faults, most_operations=2 * NUM)
    truth = survive(world)
    assert len(truth.came) > 10 and world.counts["killed"] > 2
    assert truth.told and truth.last_at > world.calm_at


# ---------------------------------------------------------------- one silo's part


class Box:
    """What a silo's part reads and writes."""

    by = 1

    def __init__(self):
        self.sent, self.decisions, self.asked = {}, {}, None

    def publish(self, kind, serial, head, payload=()):
        self.sent[kind] = head, b"".join(payload)

    def newest_note(self, kind, known):
        return None if self.asked is None or (known is not None and self.asked[0] == known) else self.asked

    def read(self, what, serial):
        return self.decisions.get(what)

    def decide(self, what, head, payload=()):
        self.decisions[what] = unpacked(b"".join(packed(head, payload)[0]))
        return self.decisions[what].digest

    def ask(self, epoch, of, public):
        self.asked = File(ASK, 2, epoch, ""), unpacked(b"".join(packed({"of": of, "key": public.hex()})[0]))


def shared(num=4, threshold=2):
    """The parts of silos of a sum up to the roster, their boxes, and the digests of members and roster."""
    parts = [Part(f"s{i}", threshold, 2, np.full(3, i, np.uint32), [i, 1]) for i in range(num)]
    boxes = [Box() for _ in parts]
    rows = [list(Member(f"s{i}", 0, 1, "", *part.keys)) for i, part in enumerate(parts)]
    for part, box in zip(parts, boxes, strict=True):
        members = box.decide(names.MEMBERS, {"members": rows})
        assert part.turn(box, box)
    letters = [box.sent[names.SHARE][1] for box in boxes]
    for part, box in zip(parts, boxes, strict=True):
        roster = box.decide(names.ROSTER, {"of": members, "roster": [*range(num)], "why": ""}, letters)
        assert part.turn(box, box)
    return parts, boxes, members, roster


def collector(parts, num=4, threshold=2):
    found = Collector(threshold, num - 1)
    found.gather({i: part.party.advertise() for i, part in enumerate(parts)})
    found.route({i: {} for i in range(num)})
    return found


def test_a_silo_gives_every_server_the_same_answer_and_none_about_another_set():
    parts, boxes, members, roster = shared()
    (part, box), answers = (parts[0], boxes[0]), []
    survivors = box.decide(names.SURVIVORS, {"of": roster, "survivors": [0, 1, 2], "why": ""})
    assert part.turn(box, box)
    for epoch in (1, 2):  # the second server is another process
        server = collector(parts)
        box.ask(epoch, survivors, server.public)
        assert part.turn(box, box) and not part.turn(box, box)
        answers.append(server.hear(0, box.sent[names.ANSWER][1], bytes.fromhex(members)))
        with pytest.raises(ValueError, match="changed"):
            collector(parts).hear(0, box.sent[names.ANSWER][1], bytes.fromhex(members))
    assert answers[0] == answers[1] and {*answers[0].selves} == {0, 1, 2} and {*answers[0].keys} == {3}
    box.sent.clear()
    box.ask(3, box.decide(names.SURVIVORS, {"of": roster, "survivors": [0, 1, 3], "why": ""}), collector(parts).public)
    with pytest.raises(ExchangeError, match="about other survivors: nothing is told"):
        part.turn(box, box)
    assert not box.sent


@pytest.mark.parametrize("survivors", [[0], [0, 1, 7]])
def test_survivors_that_cannot_be_are_refused(survivors):
    parts, boxes, _, roster = shared()
    boxes[0].decide(names.SURVIVORS, {"of": roster, "survivors": survivors, "why": ""})
    with pytest.raises(ExchangeError, match="nothing is told"):
        parts[0].turn(boxes[0], boxes[0])


def test_decisions_that_do_not_follow_from_one_another_are_refused():
    parts, boxes, members, _ = shared()
    boxes[0].decide(names.SURVIVORS, {"of": members, "survivors": [0, 1, 2], "why": ""})
    with pytest.raises(ExchangeError, match="do not follow from what this silo knows"):
        parts[0].turn(boxes[0], boxes[0])


@pytest.mark.parametrize("by", [1, 2])
def test_a_silo_that_has_replaced_its_keys_says_so_and_nobody_waits(by):
    part, box = Part("s0", 2, 2, np.zeros(3, np.uint32), [1, 1]), Box()
    others = [Part(f"s{i}", 2, 2, np.zeros(3, np.uint32), [1, 1]) for i in range(3)]
    box.decide(
        names.MEMBERS, {"members": [list(Member(f"s{i}", 0, by, "", *one.keys)) for i, one in enumerate(others)]}
    )
    assert part.turn(box, box) and part.party is None
    assert [LEAVES in head for head, _ in box.sent.values()] == ([True] if by == Box.by else [])


def test_a_silo_that_is_lost_forgets_its_secrets():
    parts, boxes, _, roster = shared()
    boxes[3].decide(names.SURVIVORS, {"of": roster, "survivors": [0, 1, 2], "why": ""})
    assert parts[3].turn(boxes[3], boxes[3]) and parts[3].party is None and not parts[3].turn(boxes[3], boxes[3])
