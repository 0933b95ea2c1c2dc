#!/usr/bin/env bash
# Everything behind the accuracy tables of the README: every method, three seeds, two runs at a time. About an hour on two cores.
# MNIST comes from the public hub, or from DYNFED_DATA (a folder with mnist/train.parquet and mnist/test.parquet).
#   benchmarks/methods.sh [RUNS_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
runs=${1:-runs}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD

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

compare rotation digits "fedavg fedpaq1 eden1 fedpaq2 eden2"

collect() { # RUNS NAME TITLE METHOD...
  local folder=$1 name=$2 title=$3
  shift 3
  "$python" benchmarks/collect.py "$runs/$folder" "$name" --title "$title" --only "$@" --order "$@"
}

all=(FedAvg DynFed "DynFed (competence)" "DynFed (active, as printed)" "DynFed bits, no teachers" FedPAQ-2 FedPAQ-4 FedPAQ-8
  DAdaQuant "FedPAQ-4 + balanced teachers")
collect mnist-0.1 mnist-0.1 "MNIST, Dirichlet 0.1, 20 clients" "${all[@]}"
collect mnist-0.05 mnist-0.05 "MNIST, Dirichlet 0.05, 20 clients" "${all[@]}"
collect digits digits "Digits, Dirichlet 0.3, 20 clients" "${all[@]}" FedProx SCAFFOLD FedDF Local Centralised
collect mnist-0.1 ablation "MNIST, Dirichlet 0.1: what each part brings" FedAvg "float32 + balanced teachers" \
  "random bits, no teachers" "DynFed bits, no teachers" "DynFed bits by loss, no teachers" DynFed "DynFed (competence)" \
  "DynFed (mean)" FedDF "DynFed (variance)" "DynFed (entropy)" "DynFed (top_loss)" "DynFed (random teachers)" \
  "DynFed (active, as printed)" FedProx SCAFFOLD Centralised
collect rotation rotation-digits "Digits, Dirichlet 0.3: 1 and 2 bits, with and without rotation" FedAvg FedPAQ-1 "Rotate + EDEN-1" FedPAQ-2 \
  "Rotate + EDEN-2"
"$python" benchmarks/collect.py --readme
