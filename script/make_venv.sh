# Sourced by test.sh and quickstart.sh, from the repository root: makes .venv when there is none and installs the
# requirements that fit this machine, plus the requirement files given in $more. Sets $python. Run twice, it installs once.
if [ ! -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: needs python3 of version 3.10 or later" >&2; exit 2; }
    echo "making .venv"
    python3 -m venv .venv
fi
python=.venv/bin/python

# pip cannot see a GPU, so the choice is made here. An environment keeps the choice that it was made with: the two
# requirement files bring different faiss wheels, and one installed over the other breaks both.
if [ -f .venv/requirements-chosen ]; then
    chosen=$(cat .venv/requirements-chosen)
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    chosen=requirements.txt
else
    chosen=requirements-cpu.txt
fi

for file in $chosen ${more:-}; do
    sum=$(cat "$file" requirements-base.txt requirements-tools.txt requirements-demo.txt requirements-openvino.txt | cksum)
    if [ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$sum" ]; then
        echo "installing $file"
        $python -m pip install --quiet --disable-pip-version-check -r "$file"
        echo "$sum" >".venv/installed-$file"
    fi
done
echo "$chosen" >.venv/requirements-chosen
