# Sourced by test.sh, check.sh, quickstart.sh and try.sh from the repository root: creates .venv when it is missing, and
# installs the requirements that fit this machine and the requirement files in $more, each once. Sets $python.
if [ ! -x .venv/bin/python ]; then
    for found in python3 python3.13 python3.12 python3.11 python3.10 ""; do
        if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then break; fi
    done
    [ -n "$found" ] || { echo "ERROR no python3 of version 3.10 or later was found; install one" >&2; exit 2; }
    # without them the new environment would have no pip
    if ! "$found" -c "import ensurepip, venv" 2>/dev/null; then
        echo "ERROR $found cannot make environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2
        exit 2
    fi
    echo "creating .venv"
    "$found" -m venv .venv
fi
python=.venv/bin/python
if ! $python -m pip --version >/dev/null 2>&1 && ! $python -m ensurepip >/dev/null 2>&1; then
    echo "ERROR .venv has no pip; delete the folder and run the same command again" >&2
    exit 2
fi

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
        echo "ERROR milvus-lite installs faiss-cpu, which breaks the faiss-gpu in .venv; see requirements-milvus.txt" >&2
        exit 2
    fi
    sum=$(cat "$file" requirements-base.txt requirements-demo.txt requirements-lora.txt | cksum)
    if [ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$sum" ]; then
        echo "installing $file"
        $python -m pip install --quiet --disable-pip-version-check -r "$file" || {
            echo "ERROR $file was not installed, see above; the same command tries again. Where PyPI is slow or cannot be" >&2
            echo "reached, set a mirror first: export PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple" >&2
            exit 2
        }
        echo "$sum" >".venv/installed-$file"
    fi
done
echo "$chosen" >.venv/requirements-chosen
