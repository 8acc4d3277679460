# Sourced by test.sh, quickstart.sh and try.sh from the repository root: creates .venv when it is missing, and installs the
# requirements that fit this machine and the requirement files in $more, each once. Sets $python.
if [ ! -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "ERROR: needs python3, version 3.10 or later" >&2; exit 2; }
    echo "creating .venv"
    python3 -m venv .venv
fi
python=.venv/bin/python

# pip does not see a GPU, so the choice is made here. An environment keeps its first choice: the two requirement files
# install different faiss wheels, and one installed over the other breaks both.
if [ -f .venv/requirements-chosen ]; then
    chosen=$(cat .venv/requirements-chosen)
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    chosen=requirements.txt
else
    chosen=requirements-cpu.txt
fi

for file in $chosen ${more:-}; do
    if [ "$file $chosen" = "requirements-milvus.txt requirements.txt" ]; then
        echo "ERROR: milvus-lite installs faiss-cpu, which breaks the faiss-gpu in .venv; see requirements-milvus.txt" >&2
        exit 2
    fi
    sum=$(cat "$file" requirements-base.txt | cksum)
    if [ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$sum" ]; then
        echo "installing $file"
        $python -m pip install --quiet --disable-pip-version-check -r "$file"
        echo "$sum" >".venv/installed-$file"
    fi
done
echo "$chosen" >.venv/requirements-chosen
