#!/bin/sh
# Makes the environment .venv-gpu for the tests marked 'standin', or leaves it as it is when it is already right.
#
# .venv-gpu/installed says what is installed and is written last. Where gcc or the network is missing, one line says so and
# those tests skip; with REKD_REQUIRE_ALL=1, as in CI, this fails.
set -eu
cd "$(dirname "$0")/.."

stop() {
    [ "${REKD_REQUIRE_ALL:-}" = 1 ] && { echo "error: $1" >&2; exit 1; }
    echo "The tests of the GPU path are skipped: $1"
    exit 0
}

unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIRE_VIRTUALENV
command -v gcc >/dev/null || stop "there is no gcc; fix: apt-get install gcc libc6-dev"
wanted="$(cksum <tests/standin/requirements.txt) $(.venv/bin/python -I -c 'import sys; print(sys.version_info[:2])')"
if [ -f .venv-gpu/installed ] && [ "$(cat .venv-gpu/installed)" = "$wanted" ]; then
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "Making the environment .venv-gpu for the tests of the GPU path; 500 MB, half a minute"
rm -rf .venv-gpu
.venv/bin/python -I -m venv .venv-gpu
if ! .venv-gpu/bin/python -I -m pip --disable-pip-version-check --no-input install --quiet --retries 1 --timeout 20 \
    --requirement tests/standin/requirements.txt >"$scratch/log" 2>&1; then
    rm -rf .venv-gpu
    stop "pip failed ($(tail -n 1 "$scratch/log")); fix: check the network, then again"
fi
rm -rf .venv-gpu/lib/python*/site-packages/nvidia/cu*/lib # the headers are wanted; ONNX Runtime would load the runtime
printf '%s\n' "$wanted" >.venv-gpu/installed
