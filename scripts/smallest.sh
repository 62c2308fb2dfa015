#!/bin/sh
# Makes the environment .venv-base for the tests of the smallest installation, or leaves it as it is when it is right.
#
# In it are what the client and the pipeline need, with NumPy 2, and the server's wheel; the project itself is not: a test
# brings the wheel that it builds. It is of Debian's Python 3.13 where that is complete, else of the Python of .venv.
# .venv-base/installed says what is installed and is written last. Without a network one line says so and those tests
# skip; with REKD_REQUIRE_ALL=1, as in CI, this fails.
set -eu
cd "$(dirname "$0")/.."

unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIRE_VIRTUALENV
interpreter=$(PYTHON=${REKD_NEWEST:-/usr/bin/python3.13} sh scripts/preflight.sh 2>/dev/null) || interpreter=.venv/bin/python
wanted="$(cksum <pyproject.toml) $("$interpreter" -I -c 'import sys; print(sys.version_info[:2])')"
if [ -f .venv-base/installed ] && [ "$(cat .venv-base/installed)" = "$wanted" ]; then
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "Making the environment .venv-base for the tests of the smallest installation; 400 MB, half a minute"
rm -rf .venv-base
"$interpreter" -I -m venv .venv-base

pip() {
    .venv-base/bin/python -I -m pip --disable-pip-version-check --no-input "$@" >"$scratch/log" 2>&1
}
server=$(sed -n 's/^serve = \["\([^;"]*\).*/\1/p' pyproject.toml)
if ! { pip install --retries 1 --timeout 20 '.[cpu]' 'numpy>=2' && pip uninstall --yes rekd-rationales &&
    pip install --retries 1 --timeout 20 --no-deps "$server"; }; then
    rm -rf .venv-base
    reason="pip failed ($(tail -n 1 "$scratch/log")); fix: check the network, then again"
    [ "${REKD_REQUIRE_ALL:-}" = 1 ] && { echo "error: $reason" >&2; exit 1; }
    echo "The tests of the smallest installation are skipped: $reason"
    exit 0
fi
printf '%s\n' "$wanted" >.venv-base/installed
