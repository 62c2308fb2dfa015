#!/bin/sh
# Finds a Python that can run the whole chain and prints its path. What is missing is named on stderr, one
# line each with its fix, and the exit status is 1. Takes a second; changes nothing.
#
#   PYTHON=/path/to/python3.13 scripts/preflight.sh     consider this one only
#
# Why so particular: Triton's python backend (wheel nvidia-pytriton) is built for Linux x86-64 with
# glibc 2.35 and embeds Python through its shared library.
set -u
cd "$(dirname "$0")/.." || exit 1

free_gigabytes_needed=6
versions="3.12 3.11 3.13" # in this order: for 3.13 the server's wheel asks for a NumPy that is not there
problems=0

problem() {
    echo "error: $1; fix: $2" >&2
    problems=1
}

# A fact sheet of one interpreter, "|" between the facts. The interpreter is run, because one that is on PATH
# may be a shim that cannot start anything.
probe='
import ctypes.util, os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
library = "libpython%s.so.1.0" % version
folders = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_exec_prefix, "lib")]
found = [f for f in folders if f and os.path.isfile(os.path.join(f, library))]
shared = "shared" if found or ctypes.util.find_library("python" + version) else ""
try:
    import ensurepip, venv
    ensurepip.version()
    environments = "venv"
except Exception:
    environments = ""
path = getattr(sys, "_base_executable", None) or sys.executable
print("|".join([sys.implementation.name, version, shared, environments, path]))
'

# What Debian calls a Python here: the first of these that its package lists offer.
packaged() {
    for version in $versions; do
        if apt-cache show "python$version" >/dev/null 2>&1; then
            echo "$version"
            return
        fi
    done
    echo 3.13
}

# Prints the path and succeeds if $1 can be used; otherwise leaves why in $reason, and in $missing what the
# right version lacks.
consider() {
    reason="does not run" missing=""
    facts=$("$1" -I -c "$probe" 2>/dev/null) || return 1
    IFS='|' read -r implementation version shared environments path <<END
$facts
END
    case "$implementation $version" in
        "cpython 3.11" | "cpython 3.12" | "cpython 3.13") ;;
        "cpython "*) reason="is Python $version"; return 1 ;;
        *) reason="is $implementation"; return 1 ;;
    esac
    [ -n "$shared" ] || missing="shared"
    [ -n "$environments" ] || missing="$missing venv"
    reason="lacks $missing"
    [ -z "$missing" ]
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set --
        for version in $versions; do set -- "$@" "python$version"; done
        set -- "$@" python3
    fi
    tried=""
    incomplete=""
    for candidate in "$@"; do
        if consider "$candidate"; then
            python=$path
            return
        fi
        tried="$tried${tried:+, }$candidate $reason"
        if [ -n "$missing" ] && [ -z "$incomplete" ]; then
            incomplete=$candidate
            incomplete_version=$version
            incomplete_missing=$missing
        fi
    done
    if [ -n "$incomplete" ]; then
        case "$incomplete_missing" in *shared*)
            problem "$incomplete has no shared library libpython$incomplete_version.so.1.0, which Triton's python backend needs" \
                "apt-get install libpython$incomplete_version (or build Python with --enable-shared; uv's and conda's are)" ;;
        esac
        case "$incomplete_missing" in *venv*)
            problem "$incomplete cannot make virtual environments (no venv or ensurepip)" \
                "apt-get install python$incomplete_version-venv" ;;
        esac
        return
    fi
    version=$(packaged)
    problem "no Python 3.11, 3.12 or 3.13 ($tried)" \
        "apt-get install python$version libpython$version python$version-venv, or name one: make PYTHON=/path/to/python3.13"
}

system=$(uname -s) machine=$(uname -m)
if [ "$system" != Linux ] || { [ "$machine" != x86_64 ] && [ "$machine" != amd64 ]; }; then
    problem "this is $system $machine; the Triton server in the Python package runs on Linux x86-64 only" \
        "use a Linux x86-64 machine or container"
    exit 1
fi

set -- $(getconf GNU_LIBC_VERSION 2>/dev/null)
glibc=${2:-0.0}
major=${glibc%%.*} minor=${glibc#*.}
minor=${minor%%.*}
if [ "$major" -lt 2 ] || { [ "$major" -eq 2 ] && [ "$minor" -lt 35 ]; }; then
    [ "$glibc" = 0.0 ] && glibc="not there (musl?)"
    problem "the C library glibc is $glibc; the Triton server needs 2.35 or newer" \
        "use Debian 12, Ubuntu 22.04 or newer"
fi

python=""
find_python

if probe_file=$(mktemp ./.writable-XXXXXX 2>/dev/null); then
    rm -f "$probe_file"
else
    problem "the folder $(pwd) cannot be written to" "copy the project to a folder of yours"
fi

# Room is needed only where the environment is still to be made.
if [ ! -e .venv/installed ]; then
    set -- $(df -Pk . | tail -n 1)
    free_gigabytes=$(((${4:-0}) / 1048576))
    if [ "$free_gigabytes" -lt "$free_gigabytes_needed" ]; then
        problem "$free_gigabytes GB are free in $(pwd); the packages need about $free_gigabytes_needed GB" \
            "free some space, or copy the project to a larger disk"
    fi
fi

[ "$problems" -eq 0 ] || exit 1
echo "$python"
