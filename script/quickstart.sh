#!/bin/sh
# The whole recall stage on the sample collection, on a CPU, with no download but the Python packages: sh script/quickstart.sh
set -eu
cd "$(dirname "$0")/.."
more=""
. script/make_venv.sh

out=output/debug
sample=script/sample_data
to_json() {
    $python metric/convert_recall_res_to_json.py $sample/dev/q2qid.dev.json \
        $sample/passage-collection/passage2id.map.json "$1" 50
}

echo "== 1/4 the model before training (random weights), for comparison"
$python do_dual_infer.py --debug --dual_params none --output_dir $out/untrained
to_json $out/untrained/res.top50
echo "== 2/4 train the dual encoder"
$python do_dual_train.py --debug
echo "== 3/4 encode and search"
$python do_dual_infer.py --debug
echo "== 4/4 convert and score"
to_json $out/res.top50
$python script/show_metrics.py $sample/dev/dev.json \
    "untrained dual encoder=$out/untrained/dual_res.json" "dual encoder=$out/dual_res.json"
echo
echo "weights  $out/dual_params.bin      settings  $out/dual_hparams.json"
echo "vectors  $out/para_emb/            run       $out/res.top50 (query, row, rank, score)"
echo "result   $out/dual_res.json        curves    $python -m tensorboard.main --logdir $out/tensorboard"
