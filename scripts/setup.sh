#!/bin/sh
# Makes .venv and installs retrain into it, editable, at the versions of constraints.txt.
# Usage: scripts/setup.sh [dev]. Run by make, in the root of the checkout.
# Python: $PYTHON when set, else the first of python3, python3.13, 3.12, 3.11 that is new enough.
set -eu

extra=${1:-}
root=$(pwd -P)
log=.venv/install.log

fail() {
    echo "setup: $*" >&2
    exit 1
}

python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_new_enough() {
    case $1 in
        3.[0-9] | 3.10) return 1 ;;
        3.*) return 0 ;;
        *) return 1 ;;
    esac
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        version=$(python_version "$PYTHON") || fail "PYTHON=$PYTHON does not run"
        is_new_enough "$version" ||
            fail "PYTHON=$PYTHON is Python $version; retrain needs 3.11 or newer"
        python=$PYTHON
        return
    fi
    seen=
    for python in python3 python3.13 python3.12 python3.11; do
        version=$(python_version "$python") || continue
        is_new_enough "$version" && return
        seen="$seen $python is $version;"
    done
    fail "no Python 3.11 or newer found;${seen} install one, or name it: make PYTHON=/path/to/python"
}

make_venv() {
    find_python
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian, Ubuntu: apt install python$version-venv)" \
            "or name another Python: make PYTHON=/path/to/python"
    echo "setup: making .venv with $python ($version)"
    message=$("$python" -m venv --clear .venv 2>&1) ||
        fail "$python -m venv failed: $(echo "$message" | tail -n 1)"
    echo "$root" >.venv/.root
}

check_venv() {
    version=$(python_version .venv/bin/python) ||
        fail "the Python of .venv does not run; 'make clean' removes .venv, then try again"
    is_new_enough "$version" ||
        fail "the Python of .venv is $version; 'make clean' removes .venv, then try again"
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        fail "there is no pip in .venv; 'make clean' removes .venv, then try again"
    echo "$root" >.venv/.root
}

in_log() {
    grep -Eq "$1" "$log"
}

likely_cause() {
    if in_log 'No space left on device|Disk quota exceeded'; then
        echo "the disk is full"
    elif in_log 'CERTIFICATE_VERIFY_FAILED|SSLError'; then
        echo "the package index's certificate was refused; check the proxy and pip's 'cert' setting"
    elif in_log 'NewConnectionError|NameResolutionError|Failed to establish|Max retries exceeded' ||
        in_log 'name resolution|Name or service not known|nodename nor servname|unreachable' ||
        in_log 'ProxyError|[Tt]imed out|TimeoutError|Connection (refused|reset|broken|aborted)'; then
        echo "no network: pip could not reach a package index; check the connection and the proxy"
    elif in_log 'requires a different Python|Requires-Python'; then
        echo "a dependency does not support this Python; try another: make clean, make PYTHON=..."
    elif in_log 'ResolutionImpossible|conflicting dependencies'; then
        echo "pyproject.toml and constraints.txt ask for different versions"
    elif in_log "command '.*(cc|clang|c\+\+|g\+\+).*' failed|Python.h: No such file"; then
        echo "a dependency is compiled on this machine; install a C compiler and Python's headers"
    elif in_log 'from versions: none'; then
        echo "no network, or no package index offers $(missing); check pip's index settings"
    elif in_log 'No matching distribution found'; then
        echo "no matching version of $(missing) for this Python and system"
    else
        cause=$(grep -E '^ *(ERROR|error):? ' "$log" | tail -n 1)
        echo "${cause:-pip stopped; the end of the log says where}"
    fi
}

missing() {
    sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' "$log" | tail -n 1
}

install() {
    target=${extra:+".[$extra]"}
    echo "setup: installing retrain${extra:+[$extra]} into .venv, log in $log" \
        "(the first time downloads PyTorch)"
    started=$(date +%s)
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c constraints.txt -e "${target:-.}" >"$log" 2>&1 ||
        fail "install failed: $(likely_cause) (log: $log)"
    echo "setup: ready after $(($(date +%s) - started)) s"
}

[ -f pyproject.toml ] && [ -f constraints.txt ] || fail "run this in the root of the checkout"
moved=
if [ -f .venv/.root ] && [ "$(cat .venv/.root)" != "$root" ]; then
    moved=yes
fi
if [ -d .venv ] && [ -z "$moved" ]; then
    check_venv
else
    make_venv
fi
install
touch .venv/.installed
if [ -n "$extra" ]; then
    touch ".venv/.installed-$extra"
fi
