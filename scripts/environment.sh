#!/bin/sh
# Makes the environment .venv with the extras given, or leaves it as it is when it is already right.
#
#   scripts/environment.sh cpu,serve,demo
#
# .venv/installed says what is installed and is written last. While something is being made or installed,
# .venv.unfinished exists; found at the start it means that the last run was cut off, and all is made again.
set -eu
cd "$(dirname "$0")/.."
extras=$1

# The caller's Python settings must not reach into the environment.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PYTHONOPTIMIZE PYTHONWARNINGS VIRTUAL_ENV
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIRE_VIRTUALENV

python=.venv/bin/python
record=.venv/installed
unfinished=.venv.unfinished
sources="$(pwd) $(cksum <pyproject.toml)" # an editable installation ends where the folder moves

pip() {
    "$python" -I -m pip --disable-pip-version-check --no-input "$@"
}

# The interpreter that .venv was made from; fails when .venv cannot run.
base_of() {
    "$1" -I -c 'import sys; print((3, 11) <= sys.version_info[:2] <= (3, 13), sys.base_prefix)' 2>/dev/null
}

recorded="" installed=""
if [ -e "$unfinished" ] || ! base=$(base_of "$python"); then
    state=absent
elif [ -n "${PYTHON:-}" ] && [ "$(base_of "$PYTHON")" != "$base" ]; then
    state=absent
elif [ "${base%% *}" != True ]; then
    echo "error: .venv is an environment of another Python than 3.11 to 3.13; fix: rm -r .venv, then again" >&2
    exit 1
else
    state=present
    if [ -f "$record" ]; then
        { read -r recorded && read -r installed; } <"$record" || true
    fi
fi

complete=yes
for extra in $(echo "$extras" | tr , ' '); do
    case ",$installed," in *",$extra,"*) ;; *) complete=no ;; esac
done
if [ "$complete" = yes ] && [ "$recorded" = "$sources" ]; then
    exit 0
fi

interpreter=$(sh scripts/preflight.sh)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM HUP

: >"$unfinished"
if [ "$state" = absent ]; then
    echo "Making the environment .venv with $interpreter"
    rm -rf .venv
    "$interpreter" -I -m venv .venv
fi
if ! pip download --quiet --no-deps --retries 1 --timeout 20 --dest "$scratch" typer >"$scratch/log" 2>&1; then
    [ "$state" = absent ] || rm -f "$unfinished" # nothing has been touched
    echo "error: pip cannot reach the Python package index ($(tail -n 1 "$scratch/log"));" \
        "fix: check the network, or name a mirror: pip config set global.index-url URL" >&2
    exit 1
fi
all=$(echo "$installed,$extras" | tr , '\n' | sort -u | grep . | tr '\n' , | sed 's/,$//')
echo "Installing the extras $all; the first time this takes some minutes"
rm -f "$record"
pip install --quiet --editable ".[$all]"
case ",$all," in *,serve,*)
    # the server's wheel asks for NumPy 1, which there is no more for Python 3.13; it runs with NumPy 2
    if "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
        pip install --quiet --no-deps "$(sed -n 's/^serve = \["\([^;"]*\).*/\1/p' pyproject.toml)"
    fi ;;
esac
printf '%s\n%s\n' "$sources" "$all" >"$record"
rm -f "$unfinished"
