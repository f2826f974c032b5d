"""Placement: longest processing time first, pins, and the same answer on every rank."""

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from support.runs import OWN
from typer.testing import CliRunner

from fedmpi import cli, placement
from fedmpi.cli import training
from fedmpi.errors import ConfigError
from fedmpi.types import Silo


def silos(*sizes, **hosts):
    return [Silo(f"s{i}", size, hosts.get(f"s{i}")) for i, size in enumerate(sizes)]


def place(*given):
    return placement.place(*given).ranks


def loads(some, owners, num_ranks):
    total = Counter(range(0))
    for silo, owner in zip(some, owners, strict=True):
        total[owner] += silo.num_samples or 0
    return [total[rank] for rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "owners"),
    [
        ((7, 7, 6, 6, 5, 5, 4, 4, 4), 3, [0, 1, 2, 2, 0, 1, 0, 1, 2]),  # the example in Graham 1969 has this shape
        ((1, 2, 3), 1, [0, 0, 0]),
        ((5, 5), 4, [0, 1]),
        ((1, 2, 3, 4), 4, [3, 2, 1, 0]),
        ((10, 40, 20, 10), 2, [1, 0, 1, 1]),
        ((), 2, []),
    ],
)
def test_the_largest_silo_goes_first_to_the_rank_with_least_to_do(sizes, num_ranks, owners):
    assert place(silos(*sizes), ["n"] * num_ranks) == owners


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_has_more_than_four_thirds_of_the_best_there_can_be(seed):
    draw = random.Random(seed)
    some = silos(*(draw.randint(1, 1000) for _ in range(draw.randint(1, 40))))
    num_ranks = draw.randint(1, 8)
    owners = place(some, ["n"] * num_ranks)
    sizes = [silo.num_samples for silo in some]
    at_least = max(max(sizes), sum(sizes) / num_ranks)
    assert max(loads(some, owners, num_ranks)) <= (4 / 3) * at_least + max(sizes) / 3
    assert owners == place(some, ["n"] * num_ranks)
    if len(some) >= num_ranks:
        assert set(owners) == set(range(num_ranks))


def test_equal_silos_take_turns_in_the_order_of_the_federation():
    assert place(silos(*[3] * 7), ["n"] * 3) == [0, 1, 2, 0, 1, 2, 0]


def test_a_silo_of_undeclared_size_counts_as_the_mean_of_the_others():
    assert place(silos(10, 10, 40, None), ["n"] * 3) == [2, 2, 0, 1]  # 40, 20, 10, 10
    assert place(silos(30, 25, None, 5), ["n"] * 2) == [0, 1, 1, 0]  # 30, 25, 20, 5
    assert place(silos(None, None, None, None), ["n", "n"]) == [0, 1, 0, 1]


@pytest.mark.parametrize(("name", "rank"), [("n1", 1), ("n1.site.org", 1), ("n2", 2)])
def test_a_pinned_silo_is_where_its_host_is_with_or_without_the_domain(name, rank):
    hosts = ["n0.site.org", "n1.site.org", "n2", "n0.site.org"]
    assert place(silos(1, 5, s0=name), hosts)[0] == rank


def test_a_rank_with_pinned_silos_hosts_no_others():
    some = silos(100, 60, 50, 10, s3="b", s1="b")
    assert place(some, ["a", "b"]) == [0, 1, 0, 1]
    assert place(some, ["a", "b", "b"]) == [0, 1, 0, 2]
    assert place(silos(50, 40, s1="a"), ["a", "b"]) == [1, 0]
    assert place(silos(5, 5, 5, s0="b", s1="b", s2="b"), ["a", "b", "b"]) == [1, 2, 1]


@pytest.mark.parametrize("dedicated", [False, True])
def test_a_dedicated_server_hosts_no_silo(dedicated):
    assert (0 in place(silos(*range(1, 9)), ["n"] * 3, dedicated)) is not dedicated


@pytest.mark.parametrize(
    ("some", "hosts", "dedicated", "says"),
    [
        (silos(1, s0="c"), ["a", "b", "a"], False, "silo 's0' is pinned to host 'c', but ranks are on: a, b"),
        (silos(1, s0="a.org"), ["a.com"], False, "silo 's0' is pinned to host 'a.org', but ranks are on: a.com"),
        (silos(1, s0="a"), ["ab"], False, "silo 's0' is pinned to host 'a', but ranks are on: ab"),
        (silos(1, s0="a"), ["a", "b"], True, "silo 's0' is pinned to host 'a'"),  # rank 0, which hosts none
        (
            silos(2, 1, 1, s0="a", s1="b"),
            ["a", "b"],
            False,
            "silo 's2' has no rank: pinned silos hold them all; start more ranks",
        ),
        (silos(1), ["a"], True, "server.dedicated: needs at least 2 ranks"),
    ],
)
def test_what_cannot_be_placed_is_one_line(some, hosts, dedicated, says):
    with pytest.raises(ConfigError) as caught:
        place(some, hosts, dedicated)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_ranks_without_a_silo_are_counted_and_sizes_that_are_not_declared_are_not_made_up(tmp_path):
    (tmp_path / "a.yaml").write_text(f"data: '{OWN}Blobs'")

    def planned(*overrides):
        return CliRunner().invoke(cli.app, ["plan", str(tmp_path / "a.yaml"), *overrides, "--ranks", "5"]).output

    assert "\n2 ranks host no silo\n" in planned() and "\n1 rank hosts no silo\n" in planned("server.dedicated=true")
    assert re.search(r"│ 0 +│ s0 +│ \? +│ \? +│ .*B \+ data +│\n", planned())
    assert re.search(r"│ 0 +│ s0 +│ 20 +│ 320 B +│ .*B +│\n", planned("data.declared=20"))
    assert "host" not in planned("data.sizes=[1, 1, 1, 1, 1]").partition("configuration")[0]
    run = SimpleNamespace(central=False, resumed=0, device="cpu", threads=1, out="a", comm=SimpleNamespace(size=4))
    run.binding = "bound to 1 of 8 cores each"
    run.federation = SimpleNamespace(ids=["a", "b"], model=SimpleNamespace(num_shared=8))
    run.membership = placement.place(silos(1, 1), [""] * 2)
    run.plan = SimpleNamespace(section=SimpleNamespace(plan="root"), why="")
    run.config = SimpleNamespace(server=SimpleNamespace(dedicated=False))
    assert training._headline(run).startswith("fedmpi: 2 silos on 4 ranks, 2 ranks host no silo, 8 shared parameters, ")
    assert ", 1 thread per rank (bound to 1 of 8 cores each), out a" in training._headline(run)
