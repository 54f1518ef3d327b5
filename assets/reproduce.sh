#!/usr/bin/env bash
# Repeats the runs behind docs/results.md. A run that has a log is not run again, an interrupted one goes on.
#
#     PASCAL=DIR WEIGHTS=FILE bash assets/reproduce.sh                   # two cores, hours: photographs of 160 pixels
#     SETTINGS=gpu PASCAL=DIR WEIGHTS=FILE bash assets/reproduce.sh      # a GPU
#     SETTINGS=camvid CAMVID=DIR WEIGHTS=FILE bash assets/reproduce.sh
#
# LISTS, METHODS (names in results.py) and SEEDS say which, PARALLEL how many at a time, OUT where; SPLITS: other lists.
# fixmatch-fine wants SPLITS whose pascal/train.txt is the list 1464.
# PASCAL is a folder with JPEGImages and the folders of masks; WEIGHTS MobileNetV2's state dict, or pretrained.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python} SETTINGS=${SETTINGS:-cpu} OUT=${OUT:-runs/results}
METHODS=${METHODS:-supervised fixmatch cutmixseg dpa s4mc-cutmixseg s4mc two-streams variant}
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000  # no page is given back and taken again

shrink() {  # FROM TO: a copy in VOC's layout, 160 pixels on the long side, photographs antialiased, masks nearest
    "$PYTHON" - "$1" "$2" <<'END'
import sys
from pathlib import Path
from PIL import Image
for path in sorted(Path(sys.argv[1]).glob("[JS]*[sg]/*.*")):  # JPEGImages, SegmentationClass, SegmentationClassAug
    image, mask = Image.open(path), path.suffix == ".png"
    size = [round(160 * n / max(image.size)) for n in image.size]
    target = Path(sys.argv[2], path.parent.name, path.stem + (".png" if mask else ".jpg"))
    target.parent.mkdir(parents=True, exist_ok=True)
    how = Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR  # PIL's bilinear is antialiased
    image.resize(size, how).save(target, quality=95, subsampling=0)
END
}
run() {  # LIST-METHOD-SEED, arguments of train.py
    local out="$OUT/$SETTINGS/$1"
    [ -f "assets/logs/$SETTINGS-$1.jsonl" ] && return
    "$PYTHON" train.py "${@:2}" --out "$out" --resume > "$out.log" 2>&1 || { echo "$1 failed, see $out.log"; return 1; }
    "$PYTHON" assets/results.py keep "$SETTINGS" "$out"
}
export -f run
mkdir -p "$OUT/$SETTINGS" assets/logs

pascal="--dataset pascal --splits ${SPLITS:-splits} --optimizer adamw --lr 0.0001 --head-lr 0.001"
case $SETTINGS in
    cpu)
        [ -d "$OUT/pascal160" ] || { shrink "$PASCAL" "$OUT/part" && mv "$OUT/part" "$OUT/pascal160"; }
        lists="92 183 366 732 1464" common="$pascal --root $OUT/pascal160 --crop 129 --batch-size 4 --iters 2000" ;;
    gpu) lists="92 183 366 732 1464" common="$pascal --root $PASCAL --crop 257 --batch-size 8 --iters 1600" ;;
    camvid) lists="46" common="--dataset camvid --root $CAMVID --crop 128 --batch-size 4 --iters 2000" ;;
    *) echo "SETTINGS is $SETTINGS; expected cpu, gpu or camvid" && exit 1 ;;
esac
common+=" --framework fixmatch --unsup-norm kept --floor 0"  # what a method leaves out is the paper's, on CamVid too
common+=" --backbone mobilenet_v2 --weights $WEIGHTS --warmup-iters 200 --log-every 50 --eval-every 1000000 --workers 0"
for seed in ${SEEDS:-0 1 2}; do
    for list in ${LISTS:-$lists}; do
        for method in $METHODS; do
            options=$("$PYTHON" assets/results.py options "$method")
            echo "$list-$method-$seed" $common --labeled "$list" --seed "$seed" $options
        done
    done
done | xargs -r -P "${PARALLEL:-2}" -L 1 bash -c 'run "$@"' run
"$PYTHON" assets/results.py
