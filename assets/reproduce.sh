#!/usr/bin/env bash
# Repeats the runs behind docs/results.md. A finished run is not run again, an interrupted one goes on.
#
#     bash assets/reproduce.sh                                            # drawn shapes
#     ANIMALS=DIR CAMVID=DIR WEIGHTS=FILE bash assets/reproduce.sh        # also photographs, see docs/results.md
#
# PARALLEL runs at a time (2), each with one thread. ONLY is a pattern of names, say ONLY='camvid-*'.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python}

run() {  # NAME, arguments of train.py
    [ -f "assets/logs/$1.jsonl" ] && return
    "$PYTHON" train.py "${@:2}" --log-every 50 --workers 0 --resume --out "runs/results/$1" > "runs/results-$1.log" 2>&1 &&
        "$PYTHON" assets/tables.py keep "runs/results/$1"
}
score() {  # NAME: a finished run's teacher with refinement at inference, as in the paper and by the wider context
    for context in paper bilateral; do
        local file="assets/inference/$1-$context.json"
        [ -f "$file" ] || "$PYTHON" evaluate.py "runs/results/$1/last.pth" --refine --context $context --json "$file"
    done
}
labels() {  # DATASET-LABELS IMAGES: pseudo-labels of the teachers of its first S4MC run
    for percent in 10 30 100; do
        [ -f "assets/labels/$1-$percent.json" ] || "$PYTHON" assets/labels.py --name "$1-$percent" \
            --images "$2" "runs/results/$1-s4mc-0/step-$(printf %06d $((10 * percent))).pth"
    done
}
export -f run
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000  # large images: no page is given back and taken again
mkdir -p runs assets/logs

declare -A options=(
    [supervised]="--framework supervised" [fixmatch]="--no-refinement --confidence max --threshold 0.95 --unsup-norm valid"
    [dpa]="--no-refinement" [refined-fixed]="--confidence max --threshold 0.95" [s4mc]=""
    [cutmixseg-dpa]="--framework cutmixseg --no-refinement" [cutmixseg-s4mc]="--framework cutmixseg"
    [bilateral]="--context bilateral"
    [cross]="--neighborhood cross" [5x5]="--neighborhood 5" [7x7]="--neighborhood 7" [two]="--neighbors 2"
    [min]="--select min" [random]="--select random" [prior]="--prior" [dilation4]="--dilation 4"
    [alpha20]="--alpha0 0.2" [alpha60]="--alpha0 0.6" [alpha80]="--alpha0 0.8"
    [max]="--confidence max" [entropy]="--confidence entropy"
)
job() {  # DATASET LABELS METHOD SEED, more arguments
    local name="$1-$2-$3-$4" arguments="--seed $4 ${options[$3]} ${*:5}" list
    [[ $name == ${ONLY:-*} ]] || return 0
    case $1 in
        animals)
            [ -n "${ANIMALS:-}" ] || return 0
            [ "$2" = 31 ] && list=92 || list=366
            arguments+=" --dataset folder --root $ANIMALS --labeled $ANIMALS/lists/$list.txt" ;;
        camvid)
            [ -n "${CAMVID:-}" ] || return 0
            arguments+=" --dataset camvid --root $CAMVID --labeled $2" ;;
    esac
    [ "$1" = shapes ] || arguments+=" --weights $WEIGHTS --iters 1000 --warmup-iters 150"
    [ "$3-$4" != s4mc-0 ] || arguments+=" --keep-checkpoints"
    echo "$name" $arguments  # unquoted: a blank at the end would join two lines
}
{
    for seed in 0 1 2; do
        for method in s4mc supervised dpa bilateral; do job shapes 24 $method $seed; done
    done
    for seed in 3 4; do job shapes 24 s4mc $seed; done
    for seed in 0 1 2; do
        for method in s4mc supervised dpa bilateral; do job animals 31 $method $seed; done
        for method in s4mc supervised dpa bilateral; do job camvid 46 $method $seed; done
        for method in fixmatch refined-fixed; do job animals 31 $method $seed; done
    done
    for seed in 0 1 2; do
        for method in s4mc supervised dpa bilateral fixmatch refined-fixed; do job animals 104 $method $seed; done
        for method in cutmixseg-dpa cutmixseg-s4mc; do job animals 31 $method $seed; done
    done
    for method in cross 5x5 7x7 two min random prior dilation4 alpha20 alpha60 alpha80 max entropy; do
        job animals 31 $method 0 --eval-every 1000
    done
} | xargs -r -P "${PARALLEL:-2}" -L 1 bash -c 'run "$@"' run
for path in runs/results/{animals,camvid}-*-{s4mc,dpa,bilateral}-?/; do
    name=$(basename "$path")
    if [ -f "$path/last.pth" ] && [[ $name == ${ONLY:-*} ]]; then score "$name"; fi
done
for about in "animals-31 100" "animals-104 100" "camvid-46 30"; do
    if [ -d "runs/results/${about% *}-s4mc-0" ] && [ -z "${ONLY:-}" ]; then labels $about; fi
done
"$PYTHON" assets/tables.py
