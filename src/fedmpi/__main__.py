"""`python -m fedmpi` and the `fedmpi` command."""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> None:
    """Run the command. Handlers for stop signals stand before anything heavy is imported."""
    from fedmpi import launcher, output

    atexit.register(gc.freeze)  # else Python ends with several searches for garbage among torch's objects, 0.5 s
    launcher.follow()
    output.open_streams()
    if sys.argv[1:2] in (["train"], ["run"]):
        from fedmpi import stopping

        stopping.own_process()
    if sys.argv[1:2] == ["run"] and "--" not in sys.argv and {"mpirun", "mpiexec", "srun"} & {*sys.argv}:
        output.say("fedmpi: put -- before the launcher: fedmpi run CONFIG -- mpirun -n 4", error=True)
        raise SystemExit(2)
    from fedmpi.cli import app

    app()


if __name__ == "__main__":
    main()
