#!/usr/bin/env bash
# Four silos on this machine learn handwritten digits together: from a fresh clone to a trained model.
#   jobs/quickstart.sh [key=value ...]      e.g. rounds=5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS=4
. jobs/setup.sh

rm -rf runs/digits # or the run of last time, being finished, would have nothing left to do
# --foreground: otherwise Ctrl-C does not arrive, and mpirun is stopped when it looks at the terminal.
timeout --foreground -k 10 300 mpirun -n 4 fedmpi train configs/digits.yaml "$@"
