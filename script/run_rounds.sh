#!/bin/sh
# Rounds of mining and training by one command: sh script/run_rounds.sh N [--denoise] [--knob value ...]; --help says more.
set -eu
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec $python script/run_rounds.py "$@"
