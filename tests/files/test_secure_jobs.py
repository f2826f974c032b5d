"""Sums under masks of silos in jobs of their own: the bits of a run on ranks, drop-outs, deaths of the server."""

import json
import re
import threading
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from support.runs import OWN, put_back, run
from support.silojobs import Job, OneSilo, apart, in_one_process, served, trained_apart

from fedmpi.errors import ConfigError
from fedmpi.exchange.outbox import Summed
from fedmpi.files import names, reading, sums
from fedmpi.files.envelope import Torn, unpacked
from fedmpi.files.folder import Disk
from fedmpi.files.server import Server
from fedmpi.flat import sha256
from fedmpi.jobs.masked import MaskedRemote
from fedmpi.jobs.masking import UPDATE, Parts, members_of, serial_of
from fedmpi.jobs.private import States
from fedmpi.jobs.sums import Sums
from fedmpi.keeper import Keeper
from fedmpi.opening import CHECKSUMS, checksum
from fedmpi.secure import masks, protocol, shamir
from fedmpi.secure.protocol import Party

__all__ = ["put_back"]

CLIP = {"updates": [{"name": "clip", "norm": 1.0}]}
FOUR = ("s0", "s1", "s2", "s3")


def secured(tmp_path, rounds=3, threshold=2, sizes=(20, 30, 50, 40), bits=None, largest=None, **other):
    secure = {"name": "secagg", "threshold": threshold, "bits": bits, "largest": largest}
    return apart(tmp_path, rounds, secure=secure, data={"sizes": sizes, **other.pop("data", {})}, **(CLIP | other))


class Seen:
    """What silos brought into sums, and what came of them."""

    def __init__(self):
        self.brought, self.sums = {}, defaultdict(list)  # by silo, incarnation and serial number; by serial number
        self.answers = Counter()  # by party

    def check(self):
        """Every sum is that of what its silos brought, and nobody has answered twice."""
        for serial, found in self.sums.items():
            for begun, done in found:
                if done.why:
                    continue
                by = {one.silo: one.by for one in members_of(begun)}
                brought = [self.brought[silo, by[silo], serial] for silo in done.silos]
                words = np.sum([words for words, _ in brought], axis=0, dtype=done.words.dtype)
                assert len(brought) >= 2 and (done.words == words).all()
                assert [*done.numbers] == [sum(column) for column in zip(*(row for _, row in brought), strict=True)]
            assert len({tuple(done.silos) for _, done in found if not done.why}) <= 1
        assert set(self.answers.values()) <= {1}

    def silos(self, round):
        return [done.silos for _, done in self.sums[serial_of(UPDATE, round)] if not done.why]


@pytest.fixture
def seen(monkeypatch):
    found = Seen()
    begin, finish, answer = Parts.begin, Sums.finish, Party.answer

    def began(self, serial, words, numbers):
        found.brought[self._files.silo, self._files.by, serial] = words.copy(), [*numbers]
        return begin(self, serial, words, numbers)

    def finished(self, serial, begun, *rest):
        done = finish(self, serial, begun, *rest)
        found.sums[serial].append((begun, done))
        return done

    def answered(self, *of):
        found.answers[self] += 1
        return answer(self, *of)

    monkeypatch.setattr(Parts, "begin", began)
    monkeypatch.setattr(Sums, "finish", finished)
    monkeypatch.setattr(Party, "answer", answered)
    yield found
    found.check()


CASES = {
    "clipped": {},
    "unclipped": {"updates": []},
    "coarse": {"bits": 16, "largest": 0.5},
    "adam": {"server": {"optimizer": "fedadam", "average": {}}, "evaluate": {"every": 2}},
    "drawn": {"select": {"name": "uniform", "count": 2}},
    "scaffold": {"local": {"name": "scaffold"}, "updates": []},
    "kept": {
        "model": {"name": OWN + "Normed", "dropout": 0.0},
        "local": {"name": OWN + "Keeper"},
        "exchange": {"parameters": ["base.*", "norm.*"]},
    },
    "tuned": {"evaluate": {"finetune": {"name": "sgd", "lr": 0.1, "epochs": 1}}},
}
NOT_THERE = ("seconds", "peak_rss_bytes", "bytes_up", "bytes_down", "bytes_control", "silos", "time", "crc32")


@pytest.mark.parametrize("case", CASES)
def test_sums_have_the_bits_of_a_run_on_ranks(tmp_path, seen, case):
    how = secured(tmp_path, 4, **CASES[case])
    records, there, _ = trained_apart(how, FOUR)
    plain, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)
    for one, other in zip(records, plain, strict=True):
        assert one["late"] == {} and one.get("scored_by", [*FOUR]) == [*FOUR]
        for name in other.keys() - {*NOT_THERE}:
            value = other[name]
            assert one[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
        assert all({*row} == {"rank", "num_train"} for row in one["silos"].values())


# ---------------------------------------------------------------- drop-outs


class Dying(OneSilo):
    """A silo's job that dies when it writes a letter of the updates of round 2, or once it has."""

    at = ("", "")
    silent = False  # as with kill -9: no last heart beat

    def _join(self, call):
        super()._join(call)
        files = self._post._files
        original = files.publish

        def publish(kind, number, *rest):
            dies = kind == self.at[0] and number == serial_of(UPDATE, 2)
            if dies and self.at[1] == "before":
                self._die()
            original(kind, number, *rest)
            if dies:
                self._die()

        files.publish = publish

    def _die(self):
        if self.silent:
            self._post.end = self._post._over.set
        raise KeyboardInterrupt


def with_deaths(how, dying, ids=FOUR):
    """The records and run of jobs of which some are of other kinds; each that dies is followed by a usual one."""
    jobs = [Job(how, silo, dying.get(silo, OneSilo)) for silo in ids]

    def again(silo, first):
        first.join(60)
        jobs.append(Job(how, silo))

    starters = [threading.Thread(target=again, args=(job.job.silo, job)) for job in jobs if job.job.silo in dying]
    for starter in starters:
        starter.start()
    records, run = served(how)
    for starter in starters:
        starter.join()
    for job in jobs:
        if type(job.job) is OneSilo:
            job.ended()
    return records, run


@pytest.mark.parametrize(
    ("kind", "when", "counts"),
    [
        ("share", "before", False),
        ("share", "after", False),
        ("masked", "before", False),
        ("masked", "after", True),
        ("answer", "before", True),
        ("answer", "after", True),
    ],
)
def test_a_silo_that_drops_out_in_any_phase_leaves_the_sum_of_the_others(
    tmp_path, monkeypatch, seen, kind, when, counts
):
    monkeypatch.setattr(Dying, "at", (kind, when))
    records, _ = with_deaths(secured(tmp_path, 3), {"s1": Dying})
    there = [*FOUR] if counts else ["s0", "s2", "s3"]
    assert seen.silos(2) == [there] and seen.silos(1) == seen.silos(3) == [[*FOUR]]
    assert [record["late"] for record in records] == [{}, {} if counts else {"s1": "dropped"}, {}]
    assert [record["summed"] for record in records] == [[*FOUR], there, [*FOUR]]
    assert not any("given_up" in record for record in records)


def test_a_silo_that_is_killed_counts_as_gone_after_its_lease(tmp_path, monkeypatch, seen):
    monkeypatch.setattr(Dying, "at", ("masked", "before"))
    monkeypatch.setattr(Dying, "silent", True)
    how = secured(tmp_path, 2, transport={"lease_s": 3})
    first, jobs = Job(how, "s1", Dying), [Job(how, silo) for silo in FOUR if silo != "s1"]
    records, _ = served(how)
    first.join(1)
    assert isinstance(first.error, KeyboardInterrupt) and records[1]["late"] == {"s1": "dropped"}
    assert records[1]["scored_by"] == ["s0", "s2", "s3"]
    for job in jobs:
        job.ended()


def test_two_silos_that_drop_out_in_different_phases(tmp_path, monkeypatch, seen):
    class Sharing(Dying):
        at = ("share", "after")

    class Masking(Dying):
        at = ("masked", "after")

    records, _ = with_deaths(secured(tmp_path, 3), {"s0": Sharing, "s3": Masking})
    assert seen.silos(2) == [["s1", "s2", "s3"]] and records[1]["late"] == {"s0": "dropped"}


@pytest.mark.parametrize("kind", ["share", "masked", "answer"])
def test_with_too_few_silos_a_round_is_given_up_and_changes_nothing(tmp_path, monkeypatch, seen, kind):
    monkeypatch.setattr(Dying, "at", (kind, "before"))
    finished, real = [], Summed.finish

    def finish(self, *rest):
        finished.append(self.round)
        return real(self, *rest)

    monkeypatch.setattr(Summed, "finish", finish)
    how = secured(tmp_path, 4, server={"optimizer": "fedadam", "average": {}})
    records, _ = with_deaths(how, {"s0": Dying, "s1": Dying, "s3": Dying})
    assert [record.get("given_up", "")[:8] for record in records] == ["", "1 silos ", "", ""]
    assert seen.silos(2) == [] and finished == [1, 3, 4]
    assert records[1]["summed"] == [] and records[1]["train_loss"] is None and {*records[1]["late"]} == {*FOUR}
    line = [unpacked((tmp_path / "run-share" / "line" / f"{number:08d}").read_bytes()).head for number in range(4)]
    assert line[1]["about"]["params"] == line[2]["about"]["params"] != line[3]["about"]["params"]
    assert not any(entry[4] for entry in line[2]["entries"])


@pytest.mark.parametrize("what", [names.MEMBERS, names.ROSTER, names.SURVIVORS])
def test_a_silo_leaves_a_sum_whose_decision_it_cannot_read(tmp_path, monkeypatch, seen, what):
    """The server, which has decided, does not wait for it; the next round has it again."""

    def torn(content, **of):
        job = getattr(threading.current_thread(), "job", None)
        if job is not None and job.silo == "s1" and (of["who"], of["number"]) == (what, serial_of(UPDATE, 2)):
            raise Torn("damaged")
        return unpacked(content, **of)

    monkeypatch.setattr(sums, "unpacked", torn)
    monkeypatch.setattr(reading, "DAMAGED_S", 0.3)
    trained_apart(secured(tmp_path, 3), FOUR)
    without = [silo for silo in FOUR if silo != "s1" or what == names.SURVIVORS]  # its masked words were there
    assert [seen.silos(number) for number in (1, 2, 3)] == [[[*FOUR]], [without], [[*FOUR]]]


def test_a_rejected_update_is_in_no_sum(tmp_path, seen):
    records, _, _ = trained_apart(secured(tmp_path, 3, data={"infinite": "s1"}), FOUR)
    assert [seen.silos(number) for number in (1, 2, 3)] == [[["s0", "s2", "s3"]]] * 3
    assert [record["num_rejected"] for record in records] == [1, 1, 1]


class Slow(OneSilo):
    """A silo's job that takes long in round 2."""

    def _train(self, commit, call):
        if call.round == 2:
            time.sleep(5)
        super()._train(commit, call)


def test_a_late_silo_is_cut_off_and_goes_on(tmp_path, seen):
    policy = {"name": "deadline", "deadline_s": 2.0, "late": "drop", "min_silos": 2}
    how = secured(tmp_path, 6, engine={"name": "synchronous", "policy": policy})
    jobs = [Job(how, silo, Slow if silo == "s1" else OneSilo) for silo in FOUR]
    records, _ = served(how)
    for job in jobs:
        job.ended()
    late = [record["late"] for record in records]
    assert late[0] == {} and late[1] == {"s1": "dropped"} and late[-1] == {}


# ---------------------------------------------------------------- the server dies


def dies_at(monkeypatch, kind, place, count, after):
    """The server's job dies at the call number `count` of a method, before or after it."""
    left, original = [count], getattr(kind, place)

    def dies(self, *arguments, **more):
        left[0] -= 1
        if left[0] == 0 and not after:
            raise KeyboardInterrupt(place)
        found = original(self, *arguments, **more)
        if left[0] == 0:
            raise KeyboardInterrupt(place)
        return found

    monkeypatch.setattr(kind, place, dies)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_server_that_dies_anywhere_finishes_the_same_sums(tmp_path, monkeypatch, seen, after):
    how = secured(tmp_path, 10, checkpoint={"every": 2})
    jobs = [Job(how, silo) for silo in FOUR]
    served(how, rounds=1)
    # Decisions: members, roster, survivors of updates; the same of scores, and that they are closed.
    places: list[tuple[type, str, int]] = [(Server, "decide", number) for number in range(1, 8)]
    places += [(MaskedRemote, "_store", 1), (Server, "commit", 1), (Server, "forget_sums", 1)]
    died = 0
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "finish", lambda self, state: None)  # nothing is saved at the end of a start
            dies_at(patch, *place, after)
            try:
                served(how)
            except KeyboardInterrupt:
                died += 1
    assert died == len(places)
    _, there = served(how)
    for job in jobs:
        job.ended()
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [*range(1, 11)] and all(row["late"] == {} for row in rows)


def test_a_server_and_a_silo_that_die_in_one_round(tmp_path, monkeypatch, seen):
    """The survivors that an earlier start has decided are those of a later one, which asks again."""
    monkeypatch.setattr(Dying, "at", ("masked", "before"))
    how = secured(tmp_path, 3)
    jobs = [Job(how, silo, Dying if silo == "s2" else OneSilo) for silo in FOUR]
    served(how, rounds=1)
    with monkeypatch.context() as patch:
        dies_at(patch, Server, "put", 2, True)  # the call, then the question
        with pytest.raises(KeyboardInterrupt):
            served(how)
    jobs[2].join(30)
    jobs[2] = Job(how, "s2")
    served(how)
    for job in jobs:
        job.ended()
    assert seen.silos(2) == [["s0", "s1", "s3"]]


# ---------------------------------------------------------------- letters that are changed


def changed(monkeypatch, change):
    """The roster of round 2 is decided with other letters: `change` gets those of all rounds as lists."""
    original, rosters = Server.decide, {}

    def decide(self, what, serial, head, payload=()):
        if what == names.ROSTER and serial % 2 == 0:
            size = 2 * shamir.SHARE_BYTES + 16
            whole = b"".join(bytes(one) for one in payload)
            letters = rosters[serial] = [whole[at : at + size] for at in range(0, len(whole), size)]
            if serial == serial_of(UPDATE, 2):
                change(letters, rosters[serial_of(UPDATE, 1)])
            payload = letters
        return original(self, what, serial, head, payload)

    monkeypatch.setattr(Server, "decide", decide)


def flipped(letters, before):
    letters[0] = letters[0][:-1] + bytes([letters[0][-1] ^ 1])  # from s0 to s1


def swapped(letters, before):
    letters[0], letters[1] = letters[1], letters[0]  # from s0 to s1, and to s2


def replayed(letters, before):
    letters[0] = before[0]


@pytest.mark.parametrize(("change", "there"), [(flipped, "s0 s2 s3"), (swapped, "s0 s3"), (replayed, "s0 s2 s3")])
def test_a_silo_with_a_changed_letter_takes_no_part(tmp_path, monkeypatch, seen, capsys, change, there):
    changed(monkeypatch, change)
    trained_apart(secured(tmp_path, 3), FOUR)
    assert seen.silos(2) == [there.split()] and seen.silos(3) == [[*FOUR]]
    assert "updates of round 2: without this silo: a sealed message was changed" in capsys.readouterr().out


# ---------------------------------------------------------------- secrets


def test_secrets_and_updates_are_in_no_file_and_no_line(tmp_path, monkeypatch, seen, capfd):
    secrets, written = set(), []
    made, fresh, split, derive, create = (
        masks.KeyPair.__init__, masks.fresh_secret, shamir.split, masks.derive, Disk.create,
    )  # fmt: skip

    def pair(self, private=None):
        made(self, private)
        secrets.add(self.private_bytes())

    def secret():
        secrets.add(found := fresh())
        return found

    def shares(*arguments):
        found = split(*arguments)
        secrets.update(found.values())
        return found

    def key(text, *rest, **more):
        found = derive(text, *rest, **more)
        secrets.update((text, found))
        return found

    def write(self, path, parts):
        written.append((path, b"".join(bytes(part) for part in parts)))
        create(self, path, parts)

    monkeypatch.setattr(masks.KeyPair, "__init__", pair)
    monkeypatch.setattr(protocol, "fresh_secret", secret)
    monkeypatch.setattr(shamir, "split", shares)
    for module in ("fedmpi.secure.protocol.derive", "fedmpi.secure.numbers.derive"):
        monkeypatch.setattr(module, key)
    monkeypatch.setattr(Disk, "create", write)
    monkeypatch.setattr(Dying, "at", ("masked", "before"))  # so that a key is opened, too
    with_deaths(secured(tmp_path, 3), {"s1": Dying})
    assert len(secrets) > 300 and {path.partition("/")[0] for path, _ in written} > {"epochs", "shares", "answers"}
    files = [text for _, text in written]
    files += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    files += [text.encode() for text in capfd.readouterr()]
    everything = b"\0".join(files)
    heads = [json.loads(text[52 : 52 + int.from_bytes(text[8:12], "little")]) for path, text in written
             if path.startswith(("updates", "scores"))]  # fmt: skip
    assert all(bytes.fromhex(one).hex().encode() in everything for head in heads for one in head["keys"])
    forms = [form for text in secrets for form in (text, text[::-1], text.hex().encode(), text[::-1].hex().encode())]
    heads_16 = {form[:16] for form in forms}
    assert not [at for at in range(len(everything)) if everything[at : at + 16] in heads_16]
    letters = b"".join(text for path, text in written if path.startswith(("shares", "masked", "answers")))
    for words, numbers in seen.brought.values():
        assert not len(words) or words.tobytes() not in everything
        for number in numbers:
            assert abs(number) < 2**64 or number.to_bytes(32, "little", signed=True) not in letters
    assert {name for head in heads for name in head} == {"kind", "run", "who", "number", "by", "keys", "round"}


def test_checksums_of_the_data_stay_with_their_silos(tmp_path, seen):
    """A checksum of targets is one of the targets."""
    how = secured(tmp_path, 3)
    _, run, jobs = trained_apart(how, FOUR)
    share, own = tmp_path / "run-share", tmp_path / "run" / "silos"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and own not in path.parents]
    told = b"\0".join(path.read_bytes() for path in files)
    assert any(path.parent == share / "silos" for path in files) and b'"facts"' in told
    for job in jobs:
        facts_F = job.job._opened.facts_KF[0]
        assert facts_F[CHECKSUMS].all() and not run.federation.facts[job.job.silo][CHECKSUMS].any()
        texts = [str(int(one)).encode() for one in facts_F[CHECKSUMS]]
        raw = [np.array([one]).tobytes() for one in (*facts_F[CHECKSUMS], checksum(facts_F))]
        assert not [text for text in (*texts, *raw) if text in told]
    [last] = States(own / "s1" / "states", checksum(jobs[1].job._opened.facts_KF[0])).stored()
    with pytest.raises(ConfigError, match="its data differ from those that it was trained on"):
        States(own / "s1" / "states", 0).read(last, jobs[1].job._fed.silos["s1"], None)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"engine": {"name": "buffered", "size": 2}}, "secure: engine: buffered"),
        ({"transport": {"min_silos": 3}}, "transport.min_silos changes the members"),
        ({"local": {"amount": {"name": "by_delay", "budget_s": 3.0}, "steps": 3, "epochs": None}}, "by_delay"),
        ({"aggregate": "median", "exchange": {"plan": "sharded"}}, "secure: aggregate median reads single updates"),
        ({"exchange": {"scope": "silo"}}, "secure: exchange.scope: silo"),
        ({"disclose": "cohort"}, "secure: only sums are told, and disclose: cohort"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(tmp_path, more, why):
    with pytest.raises(ConfigError, match=re.escape(why)) as caught:
        secured(tmp_path, **more)
    assert "\n" not in str(caught.value)


def test_neighbours_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"leave secure\.neighbours out"):
        apart(tmp_path, 3, secure={"name": "secagg", "neighbours": 2}, **CLIP)
