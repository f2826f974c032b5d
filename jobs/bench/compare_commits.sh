#!/usr/bin/env bash
# Times two commits by turns: `fedmpi bench exchange` and jobs/bench/federation_cost.py, seconds and ratios.
#   bash jobs/bench/compare_commits.sh [--quick] [--turns 5] [--ranks 2] A [B]      B: default HEAD
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
RANKS=2
. jobs/setup.sh
exec python jobs/bench/compare_commits.py "$@"
