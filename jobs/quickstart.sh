#!/usr/bin/env bash
# Trains four silos on handwritten digits on this machine: from a fresh clone to a trained model.
#   jobs/quickstart.sh [--quick] [key=value ...]      e.g. rounds=5; --quick: smoke test, one round on two ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS=4
if [ "${1-}" = --quick ]; then
  RANKS=2
  shift
  set -- rounds=1 "$@"
fi
. jobs/setup.sh

rm -rf runs/digits # otherwise a finished run of last time would be resumed, with nothing left to do
# --foreground: otherwise Ctrl-C does not reach mpirun, and mpirun is stopped when it reads the terminal.
timeout --foreground -k 10 300 mpirun -n "$RANKS" fedmpi train configs/digits.yaml "$@"
