# Sourced by the other scripts: makes .venv with the pinned versions, once, and sets PYTHON to its interpreter.
# Needs Python >= 3.10 with pip and venv, and nothing else.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
PYTHON="$root/.venv/bin/python"

make_environment() {
    local base=${RAYLTX_PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "RayLTX needs Python 3.10 or newer, and $base is $("$base" --version 2>&1); set RAYLTX_PYTHON to another" >&2
        exit 2
    fi
    echo "making .venv (once; downloads torch and Ray)" >&2
    rm -rf .venv
    # pip from outside: a Python without ensurepip can make an environment, but not one with its own pip.
    if "$base" -m venv --without-pip .venv && "$base" -m pip --python "$PYTHON" --version >/dev/null 2>&1; then
        local pip=("$base" -m pip --python "$PYTHON")
    else
        rm -rf .venv
        "$base" -m venv .venv
        local pip=("$PYTHON" -m pip)
    fi
    "${pip[@]}" install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable ".[cli,test]"
    printf '%s' "$1" > .venv/made-from
}

made_from=$(cat constraints.txt requirements.txt pyproject.toml | cksum)
if [ ! -x "$PYTHON" ] || [ "$(cat .venv/made-from 2>/dev/null)" != "$made_from" ]; then
    make_environment "$made_from"
fi
unset made_from
