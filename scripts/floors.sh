#!/bin/sh
# Are the lowest versions that pyproject.toml allows enough? Makes an environment of them and runs tests that touch each.
# Takes some minutes and 3 GB, with torch's CUDA libraries 8 GB.
#
#   scripts/floors.sh /tmp/floors                     FOLDER: where the environment goes; it must not exist
#   scripts/floors.sh /tmp/floors tests/train         other tests, nothing is written
#
# When they pass, benchmarks/results/floors.txt says which versions they were.
# Left out are the extras that bring a server or need an NVIDIA driver: serve, http, gpu, tensorrt, tensorrt-rtx.
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    echo "error: name a folder for the environment; fix: scripts/floors.sh /tmp/floors" >&2
    exit 2
fi
folder=$1
shift
if [ -e "$folder" ]; then
    echo "error: $folder is there already; fix: name another, or rm -r it" >&2
    exit 1
fi
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PYTHONOPTIMIZE PYTHONWARNINGS VIRTUAL_ENV
interpreter=$(sh scripts/preflight.sh)
"$interpreter" -I -m venv "$folder"
python=$(cd "$folder" && pwd)/bin/python

# torch comes by pip: it takes a build for CPUs (+cpu) over the plain one where both are offered, uv the plain one.
torch=$(sed -n 's/^    "torch>=\(.*\)",/\1/p' pyproject.toml)
"$python" -I -m pip --disable-pip-version-check --no-input install --quiet uv
"$python" -I -m pip --disable-pip-version-check --no-input install --quiet --no-deps "torch==$torch"
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "$PIP_FIND_LINKS" | tr ' ' ,)}"
"$python" -I -m uv pip install --quiet --python "$python" --resolution lowest-direct \
    --editable '.[cpu,demo,data,tensorboard,dev]'

all=no
if [ $# -eq 0 ]; then
    all=yes
    "$python" -I -m ruff check --quiet .
    set -- tests/train/models/test_models.py tests/train/models/test_pretrained.py tests/train/inputs/test_preprocess.py \
        tests/train/inputs/test_preprocess_image.py tests/train/data/test_data.py tests/train/data/test_own.py \
        tests/train/evaluation/test_metrics.py tests/train/training/test_loop.py \
        tests/train/cli/test_run_command.py tests/train/checkpoints/test_checkpoint.py \
        tests/deploy/export/test_export.py tests/deploy/graphs/test_modules.py tests/deploy/graphs/test_int8.py \
        tests/deploy/repository/test_build.py tests/deploy/repository/test_triton_model.py tests/deploy/client/test_client.py \
        tests/deploy/client/test_transport.py tests/deploy/contract/test_text_source.py \
        tests/deploy/client/test_render.py tests/deploy/bench/test_bench_report.py tests/deploy/files/test_deploy_files.py
fi
# An old release may use what a newer neighbour calls deprecated: it still works, and a floor asks for no more.
log=$folder/pytest.log
if ! "$python" -m pytest -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning "$@" >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "error: the tests fail with the lowest versions ($log); fix: raise the floor in pyproject.toml" >&2
    exit 1
fi
tail -n 1 "$log"
[ "$all" = yes ] || exit 0

result=benchmarks/results/floors.txt
"$python" -I - >"$result.tmp" <<'END'
import platform
from importlib import metadata
from packaging.requirements import Requirement

print(f"# written by scripts/floors.sh: Python {platform.python_version()}, {platform.machine()}; the tests passed with")
names = {Requirement(line).name for line in metadata.requires("rekd-rationales")} - {"rekd-rationales"}
for name in sorted(names):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:  # of an extra that was left out
        pass
END
mv "$result.tmp" "$result"
cat "$result"
