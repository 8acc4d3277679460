#!/bin/sh
# Both stages on the sample collection, on a CPU, with no download but the Python packages: sh script/quickstart.sh
set -eu
cd "$(dirname "$0")/.."
more=""
. script/make_venv.sh

out=output/debug
sample=script/sample_data
echo "== the dual encoder before training (random weights), for comparison"
$python do_dual_infer.py --debug --dual_params none --output_dir $out/untrained
$python metric/convert_recall_res_to_json.py $sample/dev/q2qid.dev.json \
    $sample/passage-collection/passage2id.map.json $out/untrained/res.top50 50
# The cross-encoder starts from the dual encoder: from random weights 630 queries teach it little.
sh script/run_all.sh --debug --cross_train.dual_params $out/dual_params.bin --cross_train.epoch 4
echo
$python script/show_metrics.py $sample/dev/dev.json "untrained dual encoder=$out/untrained/dual_res.json" \
    "dual encoder=$out/dual_res.json" "re-ranked by the cross-encoder=$out/cross_res.json"
echo
echo "weights  $out/dual_params.bin  $out/cross_params.bin"
echo "vectors  $out/para_emb/"
echo "runs     $out/res.top50  $out/res.rerank50   (query, row, rank, score)"
echo "results  $out/dual_res.json  $out/cross_res.json"
