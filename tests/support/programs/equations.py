"""The cases of equations/ on several ranks. Arguments: FOLDER."""

import functools
import sys

from support.equations import check
from support.equations.adaptive import CASES as ADAPTIVE
from support.equations.asynchronous import CASES as ASYNCHRONOUS
from support.equations.control import CASES as CONTROL
from support.equations.deadline import CASES as DEADLINE
from support.equations.delays import CASES as DELAYS
from support.equations.personal import CASES as PERSONAL
from support.equations.rules import CASES as RULES
from support.equations.selection import CASES as SELECTION
from support.equations.server import CASES as SERVER
from support.equations.updates import CASES as UPDATES
from support.programs.cases import run

from fedmpi.comm import connect

SYNCHRONOUS = {**CONTROL, **RULES, **SERVER, **SELECTION, **PERSONAL, **ADAPTIVE, **UPDATES, **DEADLINE}
CASES = {**SYNCHRONOUS, **ASYNCHRONOUS, **DELAYS}

if __name__ == "__main__":
    comm = connect()
    folder = comm.broadcast_text(sys.argv[1], 0)
    run({name: functools.partial(check, case, f"{folder}/{comm.size}-{name}", comm) for name, case in CASES.items()})
