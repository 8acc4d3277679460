#!/bin/sh
# The quick start: sh script/quickstart.sh
# Makes .venv, installs the packages (about 1.2 GB, more with an NVIDIA GPU), and runs both stages on the sample
# collection: BM25, search, training, re-ranking, one table. No data and no model is downloaded.
# Takes a few minutes on two CPU cores after the installation. Needs python3 (3.10 or later) with venv and pip, a
# connection for the packages, 2 GB of free memory. Writes to .venv and output/debug; the same command again skips
# what is up to date. `python script/doctor.py` looks for what does not fit.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
"") ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' script/quickstart.sh && exit ;;
*) echo "ERROR $1: quickstart.sh has no options but --help" >&2 && exit 2 ;;
esac
more="requirements-demo.txt"
. script/make_venv.sh

out=output/debug
sample=script/sample_data
# Chosen on 126 training queries set aside (504 to train): see docs/results.md.
weights="1 1"

step() {
    printf '\n== %s\n' "$1"
}
convert() { # RUN: writes dual_res.json beside it
    $python metric/convert_recall_res_to_json.py $sample/dev/q2qid.dev.json \
        $sample/passage-collection/passage2id.map.json "$1" 50
}

step "1/4 BM25, for comparison"
$python script/bm25.py index --data_dir $sample --index $out/bm25
$python script/bm25.py search --data_dir $sample --index $out/bm25 --run $out/bm25/res.top50
convert $out/bm25/res.top50
step "2/4 the encoder before training, for comparison"
$python do_dual_infer.py --debug --dual_params none --pretrained_model_path $sample/tiny_encoder --output_dir $out/zero_shot
convert $out/zero_shot/res.top50
step "3/4 train the retriever, search, train the re-ranker, re-rank"
sh script/run_all.sh --debug
step "4/4 fuse both stages: a weighted sum of their scores"
$python script/bm25.py fuse --runs $out/res.top50 $out/res.rerank50 --weights $weights --run $out/fused/res.top50
convert $out/fused/res.top50

echo
$python script/show_metrics.py $sample/dev/dev.json "BM25=$out/bm25/dual_res.json" \
    "encoder before training=$out/zero_shot/dual_res.json" "dual encoder=$out/dual_res.json" \
    "re-ranked=$out/cross_res.json" "fused=$out/fused/dual_res.json" \
    --test "dual encoder" "re-ranked" --test "dual encoder" "fused" --test "re-ranked" "fused"
echo
echo "look at it:    $python script/report.py --debug    writes $out/report.html"
echo "ask it:        $python script/demo.py --debug      opens http://127.0.0.1:7860"
