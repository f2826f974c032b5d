"""The cases of equations/ on several ranks. Arguments: FOLDER."""

import functools
import sys

from equations import check
from equations.adaptive import CASES as ADAPTIVE
from equations.control import CASES as CONTROL
from equations.personal import CASES as PERSONAL
from equations.rules import CASES as RULES
from equations.selection import CASES as SELECTION
from equations.server import CASES as SERVER
from equations.updates import CASES as UPDATES
from programs.cases import run

from fedmpi.comm import connect

CASES = {**CONTROL, **RULES, **SERVER, **SELECTION, **PERSONAL, **ADAPTIVE, **UPDATES}

if __name__ == "__main__":
    comm = connect()
    folder = comm.broadcast_text(sys.argv[1], 0)
    run({name: functools.partial(check, case, f"{folder}/{comm.size}-{name}", comm) for name, case in CASES.items()})
