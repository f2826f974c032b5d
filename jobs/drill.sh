#!/usr/bin/env bash
# What a run survives: faults made on purpose, what came of them, PASS or FAIL.
#   bash jobs/drill.sh --help               the drills, a line each
#   bash jobs/drill.sh kill-silo ...        some of them
#   bash jobs/drill.sh all                  all of them
#   bash jobs/drill.sh kill-silo --quick    in fewer rounds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS=4
. jobs/setup.sh
exec python jobs/experiments/drill.py "$@"
