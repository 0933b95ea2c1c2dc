#!/usr/bin/env bash
# Everything behind the tables of learned centres: personal models on CIFAR-10, and quantisation-aware training. About two hours on
# two cores. The data come from the public hub or from DYNFED_DATA.
#   benchmarks/quped.sh [RUNS_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
runs=${1:-runs}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD

files=()
for method in fedavg local perfedavg pfedme float 2 1 2-up4 mix; do files+=("benchmarks/configs/cifar10-quped-$method.yaml"); done
"$python" -m dynfed_lightning.cli compare "${files[@]}" --seeds 0 1 2 --jobs 2 --resume --last 1 --metric own_accuracy \
  --allow-different --out "$runs/quped"

rm -f benchmarks/results/qat.csv
"$python" benchmarks/qat.py --data mnist --seeds 0 1 2 --out benchmarks/results/qat.csv
"$python" benchmarks/qat.py --data cifar10 --seeds 0 1 2 --out benchmarks/results/qat.csv

"$python" benchmarks/quped.py "$runs/quped" --title "CIFAR-10, 10,000 images, 20 clients with 4 random classes each"
"$python" benchmarks/collect.py --readme
