# Sourced by the other scripts: makes .venv with the pinned versions, once, and sets PYTHON to its interpreter.
# EXTRAS: what is needed besides the package, of pyproject.toml's optional dependencies. One for the demo is made anew for the
# tests, which need more.
# Needs Python >= 3.10 with pip and venv, and nothing else.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
PYTHON="$root/.venv/bin/python"

make_environment() {
    local base=${RAYLTX_PYTHON:-python3} started=$SECONDS
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "RayLTX needs Python 3.10 or newer, and $base is $("$base" --version 2>&1); set RAYLTX_PYTHON to another" >&2
        exit 2
    fi
    echo "making .venv, once: downloads torch, Ray, and what else is needed for $EXTRAS" >&2
    rm -rf .venv
    # pip from outside: a Python without ensurepip can make an environment, but not one with its own pip.
    if "$base" -m venv --without-pip .venv && "$base" -m pip --python "$PYTHON" --version >/dev/null 2>&1; then
        local pip=("$base" -m pip --python "$PYTHON")
    else
        rm -rf .venv
        "$base" -m venv .venv
        local pip=("$PYTHON" -m pip)
    fi
    # Of pip's many lines those that say what takes the time.
    "${pip[@]}" install --progress-bar off --disable-pip-version-check --constraint constraints.txt torch --editable ".[$EXTRAS]" |
        { grep --line-buffered -E '^ *Downloading .*MB|^Installing collected' || true; } | cut -c -100 >&2
    printf '%s' "$1" > .venv/made-from
    echo "made in $((SECONDS - started)) s" >&2
}

made_from="$(cat constraints.txt requirements.txt pyproject.toml | cksum) for $EXTRAS"
made=$(cat .venv/made-from 2>/dev/null || true)
if [ ! -x "$PYTHON" ] || { [ "$made" != "$made_from" ] && [ "$made" != "${made_from% for *} for cli,test" ]; }; then
    make_environment "$made_from"
fi
unset made_from made
