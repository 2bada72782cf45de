#!/usr/bin/env bash
# Makes the environment and, if asked, runs the demo or the tests. Run it as often as you like.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./setup.sh [BASE_PATH] [HF_TOKEN] [--demo] [--test]
  BASE_PATH  folder that gets .venv (default: this checkout)
  HF_TOKEN   logs in to the model hub; the hub's own client keeps the token
  --demo     then: check, cache, train, samples, metrics, report on the demo (no GPU, no download)
  --test     then: all tests with coverage
TEXT
}

fail() { # one line, exit 2: the call is wrong or the machine lacks something
    echo "setup.sh: $1" >&2
    exit 2
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

parse() {
    base=$checkout token='' demo=false tests=false
    local words=()
    while [ $# -gt 0 ]; do
        case $1 in
        --demo) demo=true ;;
        --test) tests=true ;;
        -h | --help) usage && exit 0 ;;
        -*) fail "unknown option $1; known: --demo --test --help" ;;
        *) words+=("$1") ;;
        esac
        shift
    done
    [ ${#words[@]} -le 2 ] || fail "expected at most BASE_PATH and HF_TOKEN, got ${#words[@]} words"
    if [ ${#words[@]} -ge 1 ]; then
        # A token in the place of BASE_PATH would become a folder's name.
        case ${words[0]} in hf_*) fail "the first word is BASE_PATH, the token comes second: ./setup.sh . HF_TOKEN" ;; esac
        mkdir -p "${words[0]}" || fail "cannot make the folder BASE_PATH"
        base=$(cd "${words[0]}" && pwd)
    fi
    token=${words[1]:-}
}

recent() { # is $1 a Python that can make this environment?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name found=false
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14 python; do
        recent "$name" || continue
        found=true
        if "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    if $found; then
        fail "this Python lacks the venv module; install your system's python3-venv package or set PYTHON=/path/to/python"
    fi
    fail "no Python >= 3.11 found; install one or set PYTHON=/path/to/python"
}

make_venv() {
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        fail "$venv exists and is no Python environment; choose another BASE_PATH"
    fi
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        recent "$venv/bin/python" || fail "$venv has a Python older than 3.11; choose another BASE_PATH or remove it"
        return
    fi
    local interpreter
    interpreter=$(find_python)
    echo "making $venv"
    "$interpreter" -m venv "$venv"
}

stamp_of() { # digest of all that decides what is installed
    cat pyproject.toml constraints.txt VERSION <(echo "$checkout") | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'
}

install() {
    local stamp torch quiet=()
    [ -t 1 ] || quiet=(-q)
    stamp=$(stamp_of)
    if [ -e "$venv/qflux.stamp" ] && [ "$(cat "$venv/qflux.stamp")" = "$stamp" ]; then
        echo "environment is up to date: $venv"
        return
    fi
    torch=$(grep -E '^torch==' constraints.txt)
    echo "installing packages into $venv (minutes the first time)"
    # torch alone first: by far the largest, and a second run finds it in place.
    "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} "$torch"
    "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} -c constraints.txt -e '.[dev,optimizers]'
    echo "$stamp" >"$venv/qflux.stamp"
    echo "environment is ready: source $venv/bin/activate"
}

log_in() { # the token goes through a pipe: never on a command line, in a message or in a file of ours
    local secret=$token
    token=''
    printf '%s' "$secret" | "$venv/bin/python" -c '
import sys
from huggingface_hub import login
try:
    login(token=sys.stdin.read())
except Exception as error:
    sys.exit(f"setup.sh: hub login failed ({type(error).__name__}); check the token and the network")
'
    echo "logged in to the hub"
}

run_demo() {
    "$venv/bin/python" -m qflux.demo flux_kontext demo_run
    "$venv/bin/python" -m qflux.demo run demo_run
}

run_tests() { # two processes with one thread each; subprocesses are measured too ([tool.coverage.run])
    local status=0
    export OMP_NUM_THREADS=1
    "$venv/bin/python" -m coverage erase
    "$venv/bin/python" -m coverage run --parallel-mode -m pytest -n 2 --dist loadfile || status=$?
    # Processes that the tests kill leave half a data file now and then: a warning, no failure.
    "$venv/bin/python" -m coverage combine -q || true
    [ $status -eq 0 ] || return $status
    "$venv/bin/python" -m coverage report --fail-under=90
}

set +x # a traced run must not show the token either
parse "$@"
cd "$checkout"
venv=$base/.venv
make_venv
install
[ -z "$token" ] || log_in
if $demo; then run_demo; fi
if $tests; then run_tests; fi
