#!/usr/bin/env bash
# Two commits in turns: seconds of `fedmpi bench exchange` and of jobs/bench/federation_cost.py, and their ratios.
#   bash jobs/bench/compare_commits.sh [--quick] [--turns 5] [--ranks 2] A [B]      B: HEAD unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
RANKS=2
. jobs/setup.sh
exec python jobs/bench/compare_commits.py "$@"
