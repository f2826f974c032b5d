#!/usr/bin/env bash
# Four silos on this machine learn handwritten digits together: from a fresh clone to a trained model.
#   jobs/quickstart.sh [--quick] [key=value ...]      e.g. rounds=5; --quick: one round on two ranks: does it run?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS=4
if [ "${1-}" = --quick ]; then
  RANKS=2
  shift
  set -- rounds=1 "$@"
fi
. jobs/setup.sh

rm -rf runs/digits # or the run of last time, being finished, would have nothing left to do
# --foreground: otherwise Ctrl-C does not arrive, and mpirun is stopped when it looks at the terminal.
timeout --foreground -k 10 300 mpirun -n "$RANKS" fedmpi train configs/digits.yaml "$@"
