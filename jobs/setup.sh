#!/usr/bin/env bash
# Sets up the environment: a virtual environment (.venv) with mpillm, an MPI, h5py on parallel HDF5, the kernels.
#   jobs/setup.sh [--test] [--peers] [--fresh] [--prefix VENV] [--download DIR | --offline DIR]      --help tells all
# Needs no root. A second run adds what is missing, and takes a second when nothing is. PYTHON names the Python to use.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

found=()
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
  version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found+=("$(command -v "$python") is $version")
  elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    found+=("$(command -v "$python") is $version without the venv module (package python3-venv)")
  else
    exec "$python" "$here/setup" "$@"
  fi
done
[ ${#found[@]} -gt 0 ] || found=("no ${PYTHON:-python3}")
list=$(printf '; %s' "${found[@]}")
echo "mpillm: error: set-up needs Python 3.11 or newer; found: ${list:2}; load a newer one (module load python)," \
     "or name it: PYTHON=/path/to/python3.12 jobs/setup.sh" >&2
exit 2
