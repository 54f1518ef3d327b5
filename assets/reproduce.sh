#!/usr/bin/env bash
# Repeats the runs behind docs/results.md. A finished run is not run again, an interrupted one goes on.
#
#     bash assets/reproduce.sh                                       # drawn shapes
#     ANIMALS=DIR WEIGHTS=FILE bash assets/reproduce.sh              # also photographs, see docs/results.md
#
# PARALLEL runs at a time (2), each with one thread.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python}

run() {  # NAME, arguments of train.py
    [ -f "assets/logs/$1.jsonl" ] && return
    "$PYTHON" train.py "${@:2}" --log-every 50 --workers 0 --resume --out "runs/results/$1" > "runs/results-$1.log" 2>&1
    "$PYTHON" assets/tables.py keep "runs/results/$1"
}
export -f run
mkdir -p runs assets/logs

declare -A options=(
    [supervised]="--framework supervised" [fixmatch]="--no-refinement --confidence max --threshold 0.95 --unsup-norm valid"
    [dpa]="--no-refinement" [refined-fixed]="--confidence max --threshold 0.95" [s4mc]=""
)
{
    for seed in 0 1 2; do
        for method in s4mc supervised dpa; do echo "shapes-24-$method-$seed --seed $seed ${options[$method]}"; done
        echo "shapes-24-supervised-long-$seed --seed $seed ${options[supervised]} --iters 3000"
    done
    for seed in 3 4; do echo "shapes-24-s4mc-$seed --seed $seed"; done
    if [ -n "${ANIMALS:-}" ]; then
        for labels in 31 104; do
            list="$ANIMALS/lists/$([ $labels = 31 ] && echo 92 || echo 366).txt"
            for seed in 0 1 2; do
                for method in s4mc supervised dpa fixmatch refined-fixed; do
                    echo "animals-$labels-$method-$seed --dataset folder --root $ANIMALS --labeled $list --weights $WEIGHTS" \
                        "--seed $seed ${options[$method]}"
                done
            done
        done
    fi
} | xargs -P "${PARALLEL:-2}" -L 1 bash -c 'run "$@"' run
"$PYTHON" assets/tables.py
