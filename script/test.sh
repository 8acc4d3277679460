#!/bin/sh
# Run the tests: sh script/test.sh [pytest options].
# Without options: script/check.sh (ruff, mypy), then the core tests, which are those without a marker.
# -m slow, real, tools, browser, milvus or gpu selects others (pyproject.toml describes the markers); expressions such
# as -m "slow or tools" work. Creates .venv, and installs the extra requirements of a marker when it is selected.
# Takes a minute for the core tests, half an hour for -m slow; needs what script/quickstart.sh needs.
set -eu
cd "$(dirname "$0")/.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/s/^# \{0,1\}//p' script/test.sh && exit ;; esac

core="not slow and not real and not tools and not browser and not milvus and not gpu"
markers=""
previous=""
for word in "$@"; do
    [ "$previous" != "-m" ] || markers=$word
    previous=$word
done
wanted=$(echo "$markers" | sed 's/not  *[a-z]*//g')
more=requirements-test.txt
case "$wanted" in *tools*) more="$more requirements-tools.txt requirements-openvino.txt" ;; esac
case "$wanted" in *browser*) more="$more requirements-test-browser.txt" ;; esac
case "$wanted" in *milvus*) more="$more requirements-milvus.txt" ;; esac
. script/make_venv.sh

[ $# -gt 0 ] || sh script/check.sh
[ -n "$markers" ] || set -- -m "$core" "$@"
# A test per core at a time, with one thread each: small matrix products do not gain from more. Four workers take 4 GB.
OMP_NUM_THREADS=1 exec $python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
