#!/usr/bin/env bash
# Everything behind the accuracy tables of the README: every method, three seeds, two runs at a time. About an hour on two cores.
# MNIST comes from the public hub, or from DYNFED_DATA (a folder with mnist/train.parquet and mnist/test.parquet).
#   benchmarks/methods.sh [RUNS_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
runs=${1:-runs}
python=${PYTHON:-.venv/bin/python}

compare() { # FOLDER DATASET "METHODS" [overrides]
  local folder=$1 dataset=$2 methods=$3 files=()
  shift 3
  for m in $methods; do files+=("benchmarks/configs/$dataset-$m.yaml"); done
  "$python" -m dynfed_lightning.cli compare "${files[@]}" --seeds 0 1 2 --jobs 2 --resume --last 1 --out "$runs/$folder" "$@"
}

main="fedavg dynfed dynfed-competence dynfed-active dynfed-bits fedpaq2 fedpaq4 fedpaq8 dadaquant fedpaq4-balanced"
ablation="dynfed-float32 dynfed-bits-loss dynfed-bits-random dynfed-mean feddf dynfed-random dynfed-variance dynfed-entropy dynfed-top-loss"

compare mnist-0.1 mnist "$main $ablation fedprox scaffold centralised"
compare mnist-0.05 mnist "$main" --data.partitioner.alpha 0.05 --trainer.max_epochs 8 --local.max_steps 100
compare digits digits "$main fedprox scaffold feddf centralised local"

for name in mnist-0.1 mnist-0.05 digits; do
  "$python" benchmarks/collect.py "$runs/$name" "$name" --last 1 --order FedAvg DynFed "DynFed (competence)" "DynFed (active, as printed)"
done
"$python" benchmarks/collect.py --readme
