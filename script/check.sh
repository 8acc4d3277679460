#!/bin/sh
# Check the code without running it: sh script/check.sh. ruff (rules and format), then mypy: a minute, or seconds
# when repeated. Creates .venv when it is missing and installs what it needs.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
"") ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' script/check.sh && exit ;;
*) echo "ERROR $1: check.sh has no options but --help" >&2 && exit 2 ;;
esac
more="requirements-test.txt"
. script/make_venv.sh
$python -m ruff check .
$python -m ruff format --check --quiet .
$python -m mypy
