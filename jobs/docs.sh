#!/usr/bin/env bash
# Checks the documentation: blocks run, links, spelling, the generated reference, the examples of extensions; then builds
# the site into site/. Arguments go to pytest.
#
#   jobs/docs.sh [-k quickstart ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test docs" RANKS=4
. jobs/setup.sh

export FEDMPI_REQUIRE="${FEDMPI_REQUIRE-docs,mpi}" OMP_NUM_THREADS=1
unset FEDMPI_FAST
timeout --foreground -s INT -k 60 900 pytest -q -n 2 tests/docs "$@"
[ $# != 0 ] || NO_MKDOCS_2_WARNING=1 timeout 300 mkdocs build --strict --quiet
