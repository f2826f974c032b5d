"""How many file operations the transport makes: a round, a beat, a wait."""

from collections import Counter

import pytest
from support.faulty_folder import NONE, SharedFolder, World

from fedmpi.files import names
from fedmpi.files.folder import Disk, Pace
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo

RUN = {"seed": 1}


@pytest.mark.parametrize("num_silos", [1, 6])
def test_operations_of_a_round(tmp_path, num_silos):
    """A silo: 14. The server: 10, and 2 for each silo (one more to remove a commit, once there are 64). A look in vain
    is a listing more."""
    server = Server.start(Disk(tmp_path), RUN, {}, lease_s=0.1)
    silos = [Silo.start(Disk(tmp_path), RUN, f"s{k}", {}) for k in range(num_silos)]
    server.commit([], [server.put("model", 0, {})], {})

    def one_round():
        for silo in silos:
            commit = silo.look()
            silo.fetch(commit.files["model"])
            number = commit.version
            silo.publish(names.STATE, number, {})
            silo.publish(names.UPDATE, number, {})
            silo.tidy()
        arrived = server.poll()
        server.commit([one.entry() for one in arrived], [server.put("model", server.head.version + 1, {})], {})

    for _ in range(5):
        one_round()
    folders = [server.folder, *(silo.folder for silo in silos)]
    before = [Counter(folder.counts) for folder in folders]
    one_round()
    spent = [folder.counts - old for folder, old in zip(folders, before, strict=True)]
    assert spent[0] == {
        **{"list": 2, "read": num_silos, "create": 2, "sync": 2, "rename": 1, "link": 1},
        "unlink": 1 + 1 + num_silos,  # the commit's temporary name, the model of the fourth version before, updates
    }
    for silo in spent[1:]:
        assert silo == {"list": 5, "read": 2, "create": 2, "rename": 2, "sync": 2, "unlink": 1}


def test_operations_of_a_beat(tmp_path):
    server = Server.start(Disk(tmp_path), RUN, {}, lease_s=0.1)
    server.folder.counts.clear()
    server.beat({})
    assert server.folder.counts == {"list": 1, "create": 1, "rename": 1, "sync": 1}


def test_a_wait_of_an_hour_is_some_hundred_looks():
    world, waits = World(0, NONE), []

    def main(folder):
        pace = Pace(folder, 0.1, 10.0)
        while world.now_s < 3600:
            pace.wait()
            waits.append(world.now_s)
        pace.reset()
        pace.wait(0.05)
        waits.append(world.now_s)

    assert isinstance(world.spawn("waits", main), SharedFolder)
    world.run()
    assert waits[0] == pytest.approx(0.1) and waits[-1] - waits[-2] == pytest.approx(0.05)
    assert 360 < len(waits) < 380
