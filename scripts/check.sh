#!/usr/bin/env bash
# The one command before a commit: lint, format, types, fast tests. All of them run; the first failure sets the exit code.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "check.sh: no $python; run ./setup.sh first or set PYTHON" >&2; exit 2; }
export OMP_NUM_THREADS=1
status=0
step() {
    echo "== $*"
    "$python" -m "$@" || { local code=$?; [ $status -ne 0 ] || status=$code; }
}
step ruff check .
step ruff format --check .
step mypy
step pytest tests/unit -m 'not slow' -n 2 --dist loadfile
exit $status
