#!/bin/sh
# The quick start: sh script/quickstart.sh
# Makes .venv, installs the packages (about 1.2 GB, more with an NVIDIA GPU), and runs both stages on the sample
# collection: BM25, search, training, re-ranking, one table. No data and no model is downloaded.
# Takes three to four minutes on two idle CPU cores after the installation (about two more). Needs python3 (3.10 or
# later) with venv and pip, a connection for the packages, 2 GB of free memory. Writes to .venv and output/debug; the
# same command again skips what is up to date. `python script/doctor.py` looks for what does not fit.
set -eu
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
case "${1:-}" in
"") ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' script/quickstart.sh && exit ;;
*) echo "ERROR $1: quickstart.sh has no options but --help" >&2 && exit 2 ;;
esac
more="requirements-demo.txt"
. script/make_venv.sh
cd "$here" # so that the commands printed at the end work there
exec "$root/$python" "$root/script/quickstart.py"
