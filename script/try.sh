#!/bin/sh
# A search page over a file of your own by one command: sh script/try.sh FILE [options]; --help says more.
set -eu
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
case "${1:---help}" in
-h | --help)
    sed -n '/^"""/,/^"""/{s/"""//;p;}' script/try_file.py
    exit 0
    ;;
esac
case "$1" in
-*) file=$here ;;
/*) file=$1 ;;
*) file=$here/$1 ;;
esac
[ -e "$file" ] || { echo "ERROR $file: no such file or folder (passages)" >&2 && exit 2; }
more="requirements-demo.txt"
. script/make_venv.sh
cd "$here" # FILE is relative to the user's folder
exec "$root/$python" "$root/script/try_file.py" "$@"
