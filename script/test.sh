#!/bin/sh
# Run the tests: sh script/test.sh [pytest options]. Makes .venv and installs what is needed on the first run.
# Without options: ruff, then the quick tests. Others: -m slow (whole programs, kills, several processes), -m real
# (needs the real data beside the checkout), -m long (minutes each).
set -eu
cd "$(dirname "$0")/.."
more=requirements-test.txt
. script/make_venv.sh
$python -m ruff check .
$python -m ruff format --check --quiet .
if [ $# -eq 0 ]; then
    set -- -m "not slow and not real and not long"
fi
# Two tests at a time, a thread each: tiny products gain nothing from more.
OMP_NUM_THREADS=1 exec $python -m pytest -n 2 "$@"
