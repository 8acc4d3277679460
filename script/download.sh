#!/bin/sh
# Download the data set, or a pre-trained model, into the repository (--help lists the options):
#   sh script/download.sh              -> dureader-retrieval-baseline-dataset/
#   sh script/download.sh model [NAME] -> torch_pretrained_models/<last part of NAME>/
# This file looks for a suitable python and runs lib/download.py.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
needs='import sys; sys.exit(sys.version_info < (3, 10))'
if [ "${1:-}" = model ]; then
    needs='import sys, importlib.util as u; sys.exit(u.find_spec("huggingface_hub") is None)'
fi

for python in python3 .venv/bin/python "$here/../.venv/bin/python"; do
    if "$python" -c "$needs" >/dev/null 2>&1; then
        exec "$python" "$here/lib/download.py" "$@"
    fi
done

if [ "${1:-}" = model ]; then
    echo "error: huggingface_hub is not installed; run python3 -m pip install -r requirements.txt" >&2
else
    echo "error: no python3 of version 3.10 or later found" >&2
fi
exit 2
