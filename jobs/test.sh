#!/usr/bin/env bash
# Runs what a change must pass: style, types, tests. Arguments go to pytest:
#
#   jobs/test.sh [-k slurm ...]     (-n 0: one process, for debugging)
#   jobs/test.sh --fast [...]       within 90 s on two cores: only tests with the marker `fast`, which start no ranks and
#                                   need no network, SLURM or data
#   jobs/test.sh --all [...]        also tests with the marker `long`, which repeat other tests on more inputs
#   jobs/test.sh --coverage [...]   also prints lines and branches of src/ that no test ran; slower. It counts pytest's own
#                                   processes, not ranks and commands that tests start
#
# Markers, for -m (such as -m "mpi and not slow"); tests/conftest.py sets all but `slow` from a test's file and fixtures:
#
#   fast    none of those below, no whole run, no process        netns   connects ranks by network namespaces: needs root
#   slow    takes seconds of a core                              slurm   starts its own SLURM
#   mpi     starts ranks                                         data    reads data sets
#   long    takes about a minute; repeats other tests on more inputs
#
#   FEDMPI_REQUIRE=slurm,data   what tests must not skip for lack of; default: mpi, and all else that this machine has
#   FEDMPI_DATA=DIR             folder of data sets; default: ../shared/data, if it exists
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FEDMPI_FAST='' coverage=() limit=2400 chosen=(-m "not long")
while :; do
  case "${1-}" in
    --fast) FEDMPI_FAST=1 ;;
    --all) chosen=() limit=3600 ;;
    --coverage) coverage=(--cov --cov-report=term-missing) limit=7200 ;;
    *) break ;;
  esac
  shift
done
export FEDMPI_FAST
EXTRAS="report test docs" RANKS=4
. jobs/setup.sh

say() { echo "test: $*" >&2; }
PATH=$PATH:/usr/sbin:/sbin # for slurmctld, slurmd, munged and ip
has() { command -v "$1" >/dev/null; }

install_what_tests_need() {
  packages=()
  need() { has "$1" || packages+=("$2"); }
  need slurmctld slurmctld
  need slurmd slurmd
  need srun slurm-client
  need munged munge
  need strace strace
  need ip iproute2
  is_chromium_there || packages+=(chromium)
  # srun --mpi=pmix loads this library, but its package does not depend on it.
  ! has apt-get || dpkg -s libpmix2 >/dev/null 2>&1 || packages+=(libpmix2)
  if [ ${#packages[@]} -gt 0 ] && has apt-get && [ "$(id -u)" = 0 ]; then
    say "installing ${packages[*]} with apt-get, over the network"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
      >"$log" 2>&1 </dev/null || { say "apt-get failed:" && tail -n 5 "$log" >&2; }
    rm -f "$log"
  elif [ ${#packages[@]} -gt 0 ]; then
    say "not installing ${packages[*]}: that takes root and apt-get"
  fi

  # A second MPI, in its own folder, because both wheels contain an mpirun.
  mpich=$venv/mpich
  if ! [ -e "$mpich/bin/mpiexec" ]; then
    say "installing MPICH beside Open MPI with pip, over the network"
    python -m pip install -qq --no-input --disable-pip-version-check --no-deps --prefix "$mpich" mpich==5.0.2 >&2 ||
      say "pip failed, see above"
  fi
  PATH=$PATH:$mpich/bin

  # Benchmark suites, in an environment of its own. Only tests with the marker `long` need it.
  if [ ${#chosen[@]} = 0 ] && ! [ -e "$venv/reframe/bin/reframe" ]; then
    say "installing ReFrame into $venv/reframe with pip, over the network"
    { python -m venv "$venv/reframe" &&
      "$venv/reframe/bin/python" -m pip install -qq --no-input --disable-pip-version-check ReFrame-HPC==4.10.4; } >&2 ||
      say "pip failed, see above"
  fi

  # Robust aggregators, for comparison. Its dependencies would replace our torch by one for GPUs.
  if ! is_byzfl_there; then
    say "installing byzfl without its dependencies with pip, over the network"
    python -m pip install -qq --no-input --disable-pip-version-check --no-deps byzfl==0.0.11 >&2 ||
      say "pip failed, see above"
  fi
}
# shellcheck disable=SC2317 # called by name
is_chromium_there() { has chromium || has chromium-browser || has google-chrome; }
is_byzfl_there() { python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("byzfl") is None)'; }
is_transformers_there() { python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)'; }
[ -n "$FEDMPI_FAST" ] || install_what_tests_need

if [ -z "${FEDMPI_DATA-}" ] && [ -d ../shared/data ]; then
  FEDMPI_DATA=$(cd ../shared/data && pwd)
  export FEDMPI_DATA
fi
# shellcheck disable=SC2317 # called by name
slurm_is_there() {
  local program library
  for program in slurmctld slurmd srun munged; do has "$program" || return; done
  for library in /usr/lib/*/pmix2/lib/libpmix.so.2; do
    [ ! -e "$library" ] || [ -e "${library%.2}" ] || [ -w "${library%/*}" ] || return
  done
}
if [ -n "$FEDMPI_FAST" ]; then
  FEDMPI_REQUIRE=
elif [ -z "${FEDMPI_REQUIRE+set}" ]; then
  FEDMPI_REQUIRE=mpi # setup.sh installed one
  require() { # NAME REASON COMMAND...: requires NAME if the command succeeds
    if "${@:3}" >/dev/null 2>&1; then
      FEDMPI_REQUIRE+=${FEDMPI_REQUIRE:+,}$1
    else
      say "tests that need $1 may be skipped: $2"
    fi
  }
  require slurm "SLURM is not all there, or lacks what root adds once (tests/support/slurm.py)" slurm_is_there
  require strace "strace is not there or may not trace" strace -o /dev/null true
  require netns "network namespaces take root and the ip command" unshare --net ip link
  require chromium "no chromium, which draws the charts of reports" is_chromium_there
  require mpich "pip could not install it" test -x "$mpich/bin/mpiexec"
  require impi "it takes 130 MB: pip install --no-deps --prefix .venv/impi impi-rt" test -x "$venv/impi/bin/mpiexec"
  require byzfl "pip could not install it" is_byzfl_there
  require docs "pip could not install mkdocs-material and codespell" python -m mkdocs --version
  require transformers "it takes 170 MB: pip install fedmpi[examples]" is_transformers_there
  require data "no data in FEDMPI_DATA or ../shared/data" test -d "${FEDMPI_DATA-}"
fi
export FEDMPI_REQUIRE
unset PYTHONDONTWRITEBYTECODE # otherwise every rank of every launch would compile all sources again
export OMP_NUM_THREADS=1 # tests share the cores; threads that wait for each other would be slowest
say "skips count as failures for: ${FEDMPI_REQUIRE:-nothing}"

# Tests write thousands of small checkpoints, each with several waits for the disk: a third of the time of whole runs. So
# their files are in memory, if root may mount a file system there and there is room; they are gone afterwards. To keep
# them: --basetemp=DIR.
folder=()
ram=/tmp/fedmpi-tests.$$
free_kib=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo 2>/dev/null || :)
if [ "$(id -u)" = 0 ] && [ "${free_kib:-0}" -gt 10000000 ] && mkdir -m 700 "$ram" 2>/dev/null; then
  if mount -t tmpfs -o size=6g,mode=700 fedmpi-tests "$ram" 2>/dev/null; then
    trap 'umount -l "$ram"; rmdir "$ram"' EXIT
    folder=(--basetemp="$ram/tests")
  else
    rmdir "$ram"
  fi
fi

status=0
step() { # SECONDS COMMAND...: the first exit code that is not 0 becomes the job's
  local limit=$1 code=0 start=$SECONDS
  shift
  # INT, so that pytest ends the processes that it started.
  timeout --foreground -s INT -k 60 "$limit" "$@" || code=$?
  say "$* -> $code after $((SECONDS - start)) s"
  [ $status != 0 ] || status=$code
}
step 60 ruff check
step 60 ruff format --check
(
  status=0
  step 300 mypy
  exit $status
) &
types=$!
if [ -n "$FEDMPI_FAST" ]; then
  step 600 pytest -q -n 3 --dist worksteal "${folder[@]}" "${coverage[@]}" "$@"
else
  step 300 fedmpi bench codecs --params 1e4 >&2 # compiles kernels once; otherwise ranks that start together each would
  # Three processes on two cores, because many tests wait. tests/conftest.py sets the order.
  [ ${#chosen[@]} = 0 ] || say "left out are the tests with the marker long: jobs/test.sh --all runs them too"
  step "$limit" pytest -q -n 3 --dist loadscope --no-loadscope-reorder "${chosen[@]}" "${folder[@]}" "${coverage[@]}" "$@"
fi
code=0
wait "$types" || code=$?
[ $status != 0 ] || status=$code
exit $status
