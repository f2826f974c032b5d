"""Secure aggregation by messages, against plain sums: who drops out when, and what the server then has."""

import hashlib
import hmac
import itertools
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmpi.secure import numbers, shamir
from fedmpi.secure.graph import FROM, connected, degree, neighbours
from fedmpi.secure.masks import LANE_BYTES, KeyPair, Masks, add_stream, derive, seal, stream_into, unseal
from fedmpi.secure.protocol import Answer, Collector, GivenUp, Party

STAYS = 4  # phase in which a silo that never drops out drops out
LENGTH = 37


# ------------------------------------------------------------ known vectors


def test_x25519_agrees_as_in_rfc_7748():
    bob = KeyPair(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.agree(alice).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_a_public_key_of_low_order_is_refused():
    with pytest.raises(ValueError):
        KeyPair().agree(bytes(32))


def test_the_key_stream_is_aes_128_in_counter_mode():
    words = np.zeros(2, dtype=np.uint64)
    stream_into(bytes(16), words)
    assert words.tobytes().hex() == "0388dace60b6a392f328c2b971b2fe78"  # test case 2 of the specification of GCM
    key, lane = bytes(range(16)), LANE_BYTES // 8
    encrypted = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    for number, block in ((0, 1), (1, 0), (3, 7)):
        stream_into(key, words, number * lane + 2 * block)
        assert words.tobytes() == encrypted.update(number.to_bytes(12, "big") + (2 + block).to_bytes(4, "big"))


def hkdf(secret, salt, info, length):
    """RFC 5869 with SHA-256, from its text."""
    key, block, out = hmac.new(salt, secret, hashlib.sha256).digest(), b"", b""
    for number in range(1, 1 + -(-length // 32)):
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha256).digest()
        out += block
    return out[:length]


def test_keys_are_derived_by_hkdf():
    known = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)  # RFC 5869, A.1
    assert known.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    label = b"fedmpi pair\0" + (7).to_bytes(8, "big") + (1).to_bytes(8, "big")
    assert derive(b"secret", "pair", 7, 1) == hkdf(b"secret", bytes(32), label, 16)
    assert derive(b"secret", "pair", 7, 1) != derive(b"secret", "pair", 1, 7)


def test_any_t_shares_give_the_secret_and_fewer_do_not():
    secret = bytes(range(32))
    shares = shamir.split(secret, 3, [1, 2, 5, 9])
    for some in itertools.combinations(shares, 3):
        assert shamir.join({x: shares[x] for x in some}, 3) == secret
    for some in itertools.combinations(shares, 2):
        with pytest.raises(ValueError, match="3 are needed"):
            shamir.join({x: shares[x] for x in some}, 3)
    wrong = shamir.split(secret, 4, [1, 2, 5, 9])
    with pytest.raises(ValueError, match="not of one secret"):  # of a polynomial of higher degree: random in the field
        shamir.join({x: wrong[x] for x in (1, 2, 5)}, 3)


def test_two_shares_of_three_fit_every_secret():
    """For any two shares and any secret there is a polynomial through them: they say nothing about it."""
    for secret in (0, 1, 1234):
        through = {0: secret, 1: 77, 2: 99}
        third = sum(
            y * np.prod([3 - o for o in through if o != x]) // np.prod([x - o for o in through if o != x])
            for x, y in through.items()
        )
        assert shamir.at_zero({1: 77, 2: 99, 3: int(third) % 1613}, 1613) == secret


@pytest.mark.parametrize("threshold", [0, 5])
def test_impossible_shares_are_refused(threshold):
    with pytest.raises(ValueError):
        shamir.split(bytes(32), threshold, [1, 2, 3, 4])


# ------------------------------------------------------------ masks


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_piece_of_a_stream_is_the_same_by_itself(dtype):
    key = derive(b"one", "pair", 1)
    end = LANE_BYTES // np.dtype(dtype).itemsize
    whole = np.zeros(end + 100_000, dtype=dtype)
    stream_into(key, whole)
    for start, size in ((0, 1), (1, 5), (3, 70_000), (99_999, 1), (32_768, 17), (end - 5, 9), (end, 40_000)):
        part = np.zeros(size, dtype=dtype)
        stream_into(key, part, start)
        assert (part == whole[start : start + size]).all()
        added = np.full(size, 5, dtype=dtype)
        add_stream(key, 1, added, start)
        assert (added == whole[start : start + size] + dtype(5)).all()
        add_stream(key, -1, added, start)
        assert (added == 5).all()


def test_pieces_in_any_order_have_the_masks_of_the_whole():
    num = 3 * LANE_BYTES // 4
    whole, pieces = np.zeros(num, np.uint32), np.zeros(num, np.uint32)
    stream, again = (Masks([(derive(b"one", "pair", 1), 1)], 32) for _ in range(2))
    stream.add(whole)
    starts = range(0, num, num // 5 + 1)
    for start in [*starts[::-2], *starts[::2][:2], *starts]:
        pieces[start : start + starts.step] = 0
        again.add(pieces[start : start + starts.step], start)
    assert (whole == pieces).all()
    with pytest.raises(TypeError, match="not uint64"):
        stream.add(np.zeros(2, np.uint64))


def test_masks_refuse_signed_words():
    with pytest.raises(TypeError, match="unsigned"):
        add_stream(bytes(16), 1, np.zeros(4, dtype=np.int64))


def test_a_changed_message_is_refused():
    sealed = seal(bytes(16), b"shares", b"1 to 2")
    assert unseal(bytes(16), sealed, b"1 to 2") == b"shares"
    for other in ((sealed, b"2 to 1"), (sealed[:-1] + bytes([sealed[-1] ^ 1]), b"1 to 2")):
        with pytest.raises(ValueError, match="changed"):
            unseal(bytes(16), *other)


def test_keys_are_neither_shown_nor_pickled():
    pair = KeyPair()
    assert pair.private_bytes().hex() not in repr(pair) + str(vars(pair))
    with pytest.raises(TypeError):
        pickle.dumps(pair)


# ------------------------------------------------------------ the graph


@pytest.mark.parametrize(("num", "size"), [(FROM, 6), (40, 8), (41, 10)])
def test_the_graph_is_regular_symmetric_and_connected(num, size):
    publics = [hashlib.sha256(bytes([i])).digest() for i in range(num)]
    near = neighbours(publics, size)
    assert {len(set(some)) for some in near} == {size}
    assert all(i in near[j] and i != j for i, some in enumerate(near) for j in some)
    assert connected(range(num), near)
    assert near != neighbours(publics[::-1], size)[::-1]  # the order is that of the keys


def test_few_silos_all_share_masks():
    assert [degree(n) for n in (2, 5, FROM - 1, FROM)] == [1, 4, FROM - 2, FROM - 1]
    assert degree(500) < 70


# ------------------------------------------------------------ the protocol


def drawn(num, dtype=np.uint32):
    return np.random.default_rng(5).integers(0, np.iinfo(dtype).max, (num, LENGTH), dtype=dtype, endpoint=True)


class Net:
    """A set-up of n silos and a server. A silo sends nothing from the phase on in which it drops out."""

    def __init__(self, phases, threshold, near=None, num_rounds=1):
        self.phases, self.num = phases, len(phases)
        self.parties = [Party(i, threshold, num_rounds) for i in range(self.num)]
        self.server = Collector(threshold, near or self.num - 1)
        self.seen = {}  # what the server has of round 0

    def up(self, phase):
        return [party for party in self.parties if self.phases[party.index] > phase]

    def set_up(self):
        adverts = self.server.gather({p.index: p.advertise() for p in self.up(0)})
        sealed = {p.index: p.share(adverts, self.server._num_neighbours) for p in self.up(1)}
        for receiver, letters in self.server.route(sealed).items():
            self.parties[receiver].receive(letters)
        return self

    def round(self, vectors, number=0):
        masked = {}
        for party in self.up(2):
            masked[party.index] = vectors[party.index].copy()
            party.mask(number, masked[party.index])
        self.seen = masked
        there = self.server.survivors(masked)
        answers = {}
        for party in self.up(3):
            answers[party.index] = party.answer(number, there)
        return self.server.unmask(number, masked, answers)


def left(phases, phase):
    return [i for i, when in enumerate(phases) if when > phase]


def check(phases, threshold, vectors):
    """The survivors' exact sum if and only if enough silos are there to the end."""
    enough = len(left(phases, 3)) >= threshold
    try:
        total = Net(phases, threshold).set_up().round(vectors)
    except GivenUp:
        assert not enough, phases
    else:
        assert enough, phases
        assert (total == vectors[left(phases, 2)].sum(axis=0, dtype=vectors.dtype)).all(), phases


@pytest.mark.parametrize("threshold", [2, 3, 4, 5])
def test_every_number_of_drop_outs_at_every_phase_gives_the_exact_sum_or_nothing(threshold):
    draw = np.random.default_rng(threshold)
    for pattern in itertools.combinations_with_replacement(range(STAYS + 1), 5):
        check(draw.permutation(pattern).tolist(), threshold, drawn(5))  # silos differ by their place only


@pytest.mark.parametrize("first", range(STAYS + 1))
def test_every_drop_out_of_each_of_five_silos_at_every_phase(first):
    for others in itertools.product(range(STAYS + 1), repeat=4):
        check([first, *others], 3, drawn(5))


@pytest.mark.parametrize("lost", [0, 1, 2, 3, 4])
def test_every_silo_may_be_the_one_that_is_lost(lost):
    vectors = drawn(5, np.uint64)
    for phase in range(STAYS):
        phases = [phase if i == lost else STAYS for i in range(5)]
        total = Net(phases, 3).set_up().round(vectors)
        assert (total == vectors[left(phases, 2)].sum(axis=0, dtype=np.uint64)).all()


def test_a_set_up_serves_many_rounds_in_which_others_drop_out():
    vectors = drawn(5)
    net = Net([STAYS] * 5, 3, num_rounds=3).set_up()
    masked = []
    for number, phases in enumerate(([STAYS] * 5, [STAYS, 2, STAYS, 3, STAYS], [STAYS] * 5)):
        net.phases = phases
        total = net.round(vectors, number)
        assert (total == vectors[left(phases, 2)].sum(axis=0, dtype=np.uint32)).all()
        masked.append(net.seen[0])
    assert (masked[0] != masked[2]).any()  # the same vector under other masks


def test_a_graph_with_fewer_edges_gives_the_same_sums():
    vectors = drawn(20)
    phases = [STAYS] * 20
    for silo, phase in ((3, 1), (8, 2), (9, 2), (15, 3)):
        phases[silo] = phase
    net = Net(phases, 4, near=8).set_up()
    assert (net.round(vectors) == vectors[left(phases, 2)].sum(axis=0, dtype=np.uint32)).all()
    assert len(net.parties[0]._near) == 8


def test_a_silo_answers_once_and_masks_once():
    net = Net([STAYS] * 4, 3).set_up()
    net.round(drawn(4))
    with pytest.raises(ValueError, match="answered already"):  # for a second set of survivors
        net.parties[0].answer(0, [0, 1, 2])
    with pytest.raises(ValueError, match="masked already"):
        net.parties[0].mask(0, drawn(1)[0])


def test_an_answer_opens_for_a_silo_its_self_mask_or_its_key_but_never_both():
    net = Net([STAYS, STAYS, STAYS, 2, STAYS], 3).set_up()
    net.round(drawn(5))
    for number in range(2):
        fresh = Net([STAYS] * 5, 3).set_up()
        fresh.parties[number].mask(0, drawn(1)[0])
        answer = fresh.parties[number].answer(0, [0, 1, 2, 4])
        assert sorted(answer.selves) == [0, 1, 2, 4] and sorted(answer.keys) == [3]


def test_too_few_survivors_reveal_nothing():
    """The server asks, nobody answers; and what it has of each silo is uniform."""
    net = Net([STAYS, STAYS, 2, 2, 2], 3).set_up()
    with pytest.raises(GivenUp):
        net.round(drawn(5))
    for party in net.parties[:2]:
        with pytest.raises(GivenUp):
            party.answer(0, [0, 1])
    with pytest.raises(GivenUp):  # answers of fewer than t silos give no secret
        net.server.unmask(0, {i: drawn(1)[0] for i in range(3)}, {0: Answer({}, {}), 1: Answer({}, {})})


def test_numbers_beside_a_vector_are_summed_exactly_whoever_is_lost():
    net = Net([STAYS, 2, STAYS, 3, STAYS], 3).set_up()
    told = [[silo << 90, 1, *numbers.told([silo / 3, -np.inf if silo == 3 else 1e30])] for silo in range(5)]
    sent, masked = {}, {}
    for party in net.up(2):
        sent[party.index], masked[party.index] = told[party.index].copy(), drawn(5)[party.index]
        party.mask(0, masked[party.index], sent[party.index])
        assert not {*sent[party.index]} & {*told[party.index]}
    there = sorted(sent)
    answers = {party.index: party.answer(0, there) for party in net.up(3)}
    summed = [sum(column) for column in zip(*sent.values(), strict=True)]
    for key, sign in net.server.left(0, there, answers):
        numbers.add_masks(key, -sign, summed)
    weight, num, *figures = map(numbers.signed, summed)
    assert (weight, num) == (sum(there) << 90, 4)
    exact, missing = numbers.heard(figures)
    assert exact == pytest.approx(sum(there) / 3, rel=1e-15) and np.isnan(missing)


def test_an_answer_is_for_one_server_and_one_sum():
    net = Net([STAYS] * 3, 2)
    adverts = net.server.gather({p.index: p.advertise() for p in net.parties})
    sealed = {p.index: p.share(adverts, 2, b"this sum") for p in net.parties}
    with pytest.raises(ValueError, match="shared already"):
        net.parties[0].share(adverts, 2, b"another sum")
    for receiver, letters in net.server.route(sealed).items():
        net.parties[receiver].receive(letters)
    net.parties[0].mask(0, drawn(1)[0])
    answer = net.parties[0].answer(0, [0, 1])
    text = net.parties[0].seal_answer(answer, net.server.public)
    assert net.server.hear(0, text, b"this sum") == answer
    later = Collector(2, 2)
    later.gather(adverts)
    for server, silo, about in ((later, 0, b"this sum"), (net.server, 1, b"this sum"), (net.server, 0, b"another")):
        with pytest.raises(ValueError, match="changed"):
            server.hear(silo, text, about)


def test_shares_are_for_one_sum_and_one_receiver():
    net = Net([STAYS] * 3, 2)
    adverts = net.server.gather({p.index: p.advertise() for p in net.parties})
    sealed = {p.index: p.share(adverts, 2, b"this" if p.index else b"that") for p in net.parties}
    with pytest.raises(ValueError, match="changed"):
        net.parties[1].receive({0: sealed[0][1]})
    with pytest.raises(ValueError, match="changed"):
        net.parties[1].receive({2: sealed[2][0]})


def test_a_threshold_of_one_is_refused():
    for kind in (lambda: Party(0, 1), lambda: Collector(1, 3)):
        with pytest.raises(ValueError, match="the sum of one silo is its vector"):
            kind()


# ------------------------------------------------------------ what the server sees


def chi_square(words):
    """Of the 256 values of all bytes; its mean is 255, its standard deviation 22.6."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vector", [np.zeros(200_000, np.uint32), np.arange(200_000, dtype=np.uint32) % 7])
def test_a_masked_vector_is_uniform_whatever_it_holds(vector):
    assert chi_square(vector) > 1e6
    net = Net([STAYS] * 3, 2).set_up()
    net.round([vector] * 3)
    for words in net.seen.values():
        assert chi_square(words) < 255 + 5 * 22.6
        assert abs(np.corrcoef(words.astype(float), vector + np.arange(200_000) * 1e-9)[0, 1]) < 0.012  # 5 sigma


def test_a_mask_that_is_the_same_on_both_sides_fails_both_tests(monkeypatch):
    """The tests above can fail: with masks added twice the sum is wrong; without masks a payload is not uniform."""
    vector = np.zeros(200_000, np.uint32)
    monkeypatch.setattr("fedmpi.secure.protocol._sign", lambda mine, other: 1)
    assert Net([STAYS] * 3, 2).set_up().round([vector] * 3).any()
    monkeypatch.setattr("fedmpi.secure.protocol.add_stream", lambda *args: None)
    net = Net([STAYS] * 3, 2).set_up()
    net.round([vector] * 3)
    assert chi_square(net.seen[0]) > 1e6
