#!/bin/sh
# The whole chain by one command: sh script/run_all.sh [--debug] [--from STAGE] [--knob value ...]; --help says more.
set -eu
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec $python script/run_all.py "$@"
