#!/bin/sh
# The whole chain by one command: sh script/run_all.sh [--debug] [--from STAGE] [--option value ...]; --help says more.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/script/run_all.py" "$@"
