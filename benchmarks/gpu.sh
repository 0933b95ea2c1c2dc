#!/usr/bin/env bash
# Everything that needs a GPU, offline and in less than 8 minutes: builds the extension with CUDA in a copy of this checkout, runs
# the tests marked gpu and the GPU benchmarks, and leaves logs, CSV, report and figure in OUTDIR.
#   benchmarks/gpu.sh OUTDIR
# PYTHON chooses the interpreter (python3), SECONDS_IN_ALL the time limit. The exit status is the number of steps that failed.
# DEVICE=cpu DYNFED_CUDA=0 is a dry run without a GPU: the same steps on small vectors.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUTDIR}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${SECONDS_IN_ALL:-465}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
SECONDS=0
failures=0

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS LOG COMMAND...: at most SECONDS, and no longer than there is time; a failure is noted and the rest goes on.
step() {
  local name=$1 most=$2 log=$3 left=$((limit - SECONDS)) start=$SECONDS status
  shift 3
  if ((left < 5)); then
    say "$name: no time left"
    failures=$((failures + 1))
    return 1
  fi
  timeout -s "${signal:-TERM}" -k 10 "$((most < left ? most : left))" "$@" >>"$out/$log" 2>&1
  status=$?
  case $status in
    0) say "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) say "$name: cut short after $((SECONDS - start)) s (see $log)" ;;
    *) say "$name: failed with status $status after $((SECONDS - start)) s (see $log)" ;;
  esac
  ((status == 0)) || failures=$((failures + 1))
  return "$status"
}

rm -f "$out"/{summary.txt,build.log,pytest.log,kernels.log,kernels-gpu.csv,kernels-gpu.md,kernels-gpu.png,svd.log,svd-gpu.*,soft.log,soft-quantize-*}

# In a copy, without what an earlier build left: nothing in the checkout changes, and no other build is loaded by mistake.
tar -C "$root" -cf - --exclude='*.so' --exclude=__pycache__ benchmarks/*.py csrc dynfed_lightning kernels tests README.md LICENSE \
  MANIFEST.in pyproject.toml setup.py | tar -C "$work" -xf - || exit 1
cd "$work" || exit 1
# Of pyproject.toml only pytest's part: an older setuptools refuses the rest, and a build in place needs none of it.
sed -n '/^\[tool\.pytest/,$p' "$root/pyproject.toml" >pyproject.toml
export PYTHONPATH=$work${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg MPLCONFIGDIR=$work
export DYNFED_CUDA=${DYNFED_CUDA:-1} DYNFED_BUILD=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export TRITON_CACHE_DIR=$work/.triton TORCHINDUCTOR_CACHE_DIR=$work/.inductor

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>&1 || true
  nvcc --version 2>&1 | tail -n 2 || true
  "$python" -c 'import sys, torch, triton, numpy; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)' 2>&1
} | tee -a "$out/summary.txt"

if ! step "build with CUDA" 200 build.log "$python" setup.py build_ext --inplace; then
  grep -aE 'error|Error' "$out/build.log" | cut -c1-300 | head -n 8 | tee -a "$out/summary.txt"
  DYNFED_CUDA=0 step "build without CUDA" 90 build.log "$python" setup.py build_ext --inplace # Triton can still be measured
fi
"$python" - <<'PYTHON' 2>&1 | tee -a "$out/summary.txt"
from dynfed_lightning import _ops_backends as b
for name in ("cpu", "cuda", "triton"):
    try:
        print(f"backend {name}: {b.missing(name) or 'ready'}")
    except Exception as error:
        print(f"backend {name}: {type(error).__name__}: {error}")
PYTHON

# Only files that have such tests, without this project's pytest options: the machine may lack what other tests import, and a
# warning of its torch is no failure of ours.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$((MAX_JOBS > 2 ? MAX_JOBS - 2 : 1))" --dist worksteal)
mapfile -t files < <(grep -lE 'mark\.gpu|ops_support' tests/test_*.py)

# tests NAME SECONDS EXPRESSION: an interrupt instead of a kill, so that pytest cut short still says what it has found.
tests() {
  local lines=0
  [[ -s $out/pytest.log ]] && lines=$(wc -l <"$out/pytest.log")
  signal=INT step "pytest, $1" "$2" pytest.log env --default-signal=INT "$python" -m pytest -m gpu -k "$3" -q --durations=8 \
    --continue-on-collection-errors -p no:cacheprovider -o addopts=-ra -o filterwarnings=default "${parallel[@]}" "${files[@]}"
  tail -n "+$((lines + 1))" "$out/pytest.log" >"$work/tests.log"
  grep -aE '^(FAILED|ERROR)' "$work/tests.log" | cut -c1-200 | head -n 12 | tee -a "$out/summary.txt"
  say "  $(grep -aE '(passed|failed|error|skipped|deselected|no tests ran)' "$work/tests.log" | tail -n 1)"
  if [[ $device == cuda ]] && ! grep -qaE '[1-9][0-9]* passed' "$work/tests.log"; then
    say "pytest, $1: no test passed"
    failures=$((failures + 1))
  fi
}

# CUDA C++ first: it takes seconds, where Triton compiles some 600 kernels; and a fault of one must not take the other's results.
tests cuda 90 "not triton"
tests triton 140 triton

# First of the benchmarks, as it is the shortest.
svd=("$python" benchmarks/svd.py --device "$device" --seconds 0.4 --out "$out/svd-gpu.csv")
[[ $device == cpu ]] && svd+=(--spectra 1/i --shapes 8x64x64 4x128x96 --seconds 0.02)
step "benchmark, svd" 80 svd.log "${svd[@]}"
grep -a '|' "$out/svd-gpu.md" 2>/dev/null | tee -a "$out/summary.txt"

# Learned centres, by both backends; the rivals in torch against the first only.
soft=("$python" benchmarks/soft_quantize.py --device "$device" --no-compile --memory 24)
[[ $device == cpu ]] && soft+=(--size 4096 --seconds 0.002)
if [[ $device == cuda ]]; then
  step "benchmark, learned centres" 60 soft.log "${soft[@]}" --size $((1 << 25)) --seconds 0.15 --out "$out/soft-quantize-gpu.csv"
  DYNFED_BACKEND=triton step "benchmark, learned centres, triton" 40 soft.log "${soft[@]}" --size $((1 << 25)) --seconds 0.1 \
    --centers 4 16 --out "$out/soft-quantize-triton.csv"
else
  step "benchmark, learned centres" 60 soft.log "${soft[@]}" --out "$out/soft-quantize-gpu.csv"
fi
grep -ah '|' "$out"/soft-quantize-*.md 2>/dev/null | tee -a "$out/summary.txt"

# A process per backend: a fault of one must not take the other's rows. Rows are written as they come.
bench=("$python" benchmarks/kernels.py --device "$device" --plan cuda --seconds 0.15 --out "$out/kernels-gpu.csv")
[[ $device == cpu ]] && bench+=(--sizes "128K,64K" --models resnet20 --threads 1 --seconds 0.002)
step "benchmark, cuda" 120 kernels.log "${bench[@]}" --backends cuda --only main,layout,rotate
step "benchmark, triton" 100 kernels.log "${bench[@]}" --backends triton --peers none --bits 4,2,8 --append
if [[ -s $out/kernels-gpu.csv ]]; then
  limit=$((limit + 15)) # the report takes seconds, and is what one reads
  step report 15 kernels.log "$python" benchmarks/kernels.py --report "$out/kernels-gpu.csv"
  sed -n '/^## Targets/,/^Bit for bit/p' "$out/kernels-gpu.md" 2>/dev/null | tee -a "$out/summary.txt"
  grep -a ',failed: ' "$out/kernels-gpu.csv" | cut -d, -f1-5,8,10 | head -n 12 | sed 's/^/failed: /' | tee -a "$out/summary.txt"
fi
say "$SECONDS s in all, $failures failed"
exit "$failures"
