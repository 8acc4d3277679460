#!/bin/sh
# Rounds of mining and training by one command: sh script/run_rounds.sh N [--denoise] [--option value ...]; --help says more.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/script/run_rounds.py" "$@"
