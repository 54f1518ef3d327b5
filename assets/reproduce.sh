#!/usr/bin/env bash
# Repeats the runs of PASCAL and CamVid in docs/results.md. Runs with a log are skipped. Interrupted runs are resumed.
#
#     PASCAL=DIR SPLITS=DIR WEIGHTS=FILE bash assets/reproduce.sh        # one CPU core for each run, 5 to 17 minutes
#     SETTINGS=camvid CAMVID=DIR WEIGHTS=FILE bash assets/reproduce.sh
#
# LISTS, METHODS (see results.py) and SEEDS select the runs. PARALLEL: runs at a time. OUT: their folder.
# PASCAL is in VOC's layout, with photographs of 256 pixels on the long side. SPLITS has pascal/train.txt, the
# photographs that are used. WEIGHTS is a state dict of MobileNetV2, or pretrained.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python} SETTINGS=${SETTINGS:-fair} OUT=${OUT:-runs/results}
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000  # keep freed memory: faster on a CPU

run() {  # LIST-METHOD-SEED, arguments of train.py
    local out="$OUT/$SETTINGS/$1"
    [ -f "assets/logs/$SETTINGS-$1.jsonl" ] && return
    "$PYTHON" train.py "${@:2}" --out "$out" --resume > "$out.log" 2>&1 || { echo "$1 failed, see $out.log"; return 1; }
    "$PYTHON" assets/results.py keep "$SETTINGS" "$out"
}
export -f run
mkdir -p "$OUT/$SETTINGS" assets/logs

case $SETTINGS in
    fair)
        lists=183 methods="supervised fixmatch two-views dpa dpa-lower s4mc preset"
        common="--dataset pascal --root $PASCAL --splits ${SPLITS:-splits} --crop 192 --batch-size 8 --iters 600"
        common+=" --warmup-iters 100 --optimizer adamw --lr 0.0002 --head-lr 0.001 --lr-warmup 0.1" ;;
    camvid)
        lists=46 methods="fixmatch preset-views preset-long"
        common="--dataset camvid --root $CAMVID --framework fixmatch --crop 128 --batch-size 4 --iters 2000"
        common+=" --warmup-iters 200 --optimizer adamw --lr 0.0005 --head-lr 0.005 --lr-warmup 0" ;;
    camvid192)
        lists=46 methods=preset
        common="--dataset camvid --root $CAMVID --framework fixmatch --crop 192 --batch-size 8 --iters 1000"
        common+=" --warmup-iters 200 --optimizer adamw --lr 0.0002 --head-lr 0.001 --lr-warmup 0.1" ;;
    *) echo "SETTINGS is $SETTINGS; expected fair, camvid or camvid192" && exit 1 ;;
esac
common+=" --backbone mobilenet_v2 --weights $WEIGHTS --log-every 25 --eval-every 1000000 --workers 1"
for seed in ${SEEDS:-0 1 2}; do
    for list in ${LISTS:-$lists}; do
        for method in ${METHODS:-$methods}; do
            options=$("$PYTHON" assets/results.py options "$method")
            echo "$list-$method-$seed" $common --labeled "$list" --seed "$seed" $options
        done
    done
done | xargs -r -P "${PARALLEL:-2}" -L 1 bash -c 'run "$@"' run
"$PYTHON" assets/results.py
