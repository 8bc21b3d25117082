#!/usr/bin/env bash
# Make .venv and install everything in it. `make setup` calls this; it needs Python 3.11+, gcc and make.
#   PYTHON=python3.12 make setup     another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "setup: '$python' was not found; set PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: modmoe needs Python 3.11 or newer, '$python' is $("$python" -V); set PYTHON=..." >&2; exit 1; }
command -v "${CC:-gcc}" >/dev/null || { echo "setup: a C compiler (gcc) is needed to build learn2learn" >&2; exit 1; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
say() { printf '\n== %s\n' "$*"; }

say "torch and torchvision (about 90 s)"
"${pip[@]}" install -q -c constraints.txt torch torchvision

say "modmoe with every extra (about 3 minutes)"
"${pip[@]}" install -q -c constraints.txt -e '.[all,dev]'

if ! .venv/bin/python -c 'import importlib.metadata as m; m.version("learn2learn")' 2>/dev/null; then
    say "learn2learn (about 1 minute)"
    # Its sdist ships C files that do not compile on Python 3.11 or newer: Cython has to write them again.
    "${pip[@]}" install -q -c constraints.txt 'cython>=3' 'setuptools<81' wheel gym
    CYTHON_FORCE_REGEN=1 "${pip[@]}" install -q -c constraints.txt --no-deps --no-build-isolation --use-pep517 \
        --config-settings="--global-option=build_ext" learn2learn
fi
say "done: .venv is ready"
