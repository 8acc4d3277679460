#!/bin/sh
# Run the tests: sh script/test.sh [pytest options]. Makes .venv and installs what is needed on the first run.
# Without options: ruff, then every test but those marked slow; `-m slow` runs the slow ones.
set -eu
cd "$(dirname "$0")/.."
more=requirements-test.txt
. script/make_venv.sh
$python -m ruff check .
$python -m ruff format --check --quiet .
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
exec $python -m pytest "$@"
