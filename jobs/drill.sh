#!/usr/bin/env bash
# Injects faults into training runs and checks that each run survives: PASS or FAIL.
#   bash jobs/drill.sh --help               lists the drills
#   bash jobs/drill.sh kill-silo ...        runs some of them
#   bash jobs/drill.sh all                  runs all of them
#   bash jobs/drill.sh kill-silo --quick    in fewer rounds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS=4
. jobs/setup.sh
exec python jobs/experiments/drill.py "$@"
