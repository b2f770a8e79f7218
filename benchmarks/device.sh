#!/usr/bin/env bash
# Everything that a machine with one GPU is needed for, in at most twelve minutes: the tests on the GPU, ratios of the
# parts, then whole trainings, alone on the machine. What is finished when the budget ends is kept in OUT.
#
#   benchmarks/device.sh [--budget SECONDS] [--data FOLDER] [--out FOLDER] [--weights FILE] [--dry-run]
#
# Needed beside torch, torchvision, pytorch-lightning, timm, torchmetrics and pytest with pytest-xdist: kornia (with
# kornia_rs) and faiss-cpu, for example as wheels installed into a folder on PYTHONPATH; cifar10_train.npz and
# cifar10_test.npz (56 MB) in FOLDER; for fine-tuning the ImageNet weights of EfficientNet-Lite0 (19 MB).
# PYTHON names another interpreter than python3; BENCHMARK_COMMIT the commit, where git does not say which one runs.
# --dry-run: a few images on the CPU, and no tests.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} budget=700 data=../shared/data out=benchmarks/runs weights='' dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --budget) budget=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --weights) weights=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    *) echo "unknown argument: $1" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
over() { [ $? -ge 124 ]; }  # the budget ended a command: what it has finished is kept
left() { echo $((budget - SECONDS)); }
status=0
if [ -z "$dry" ]; then
  device=cuda workers=12 size=()
  timeout -k 5 "$(($(left) / 3))" $python -m pytest --accelerator gpu -n 12 -q -m 'not slow and not benchmark' -p no:benchmark \
    tests/gpu tests/contract tests/scanning tests/responses tests/metrics >"$out/pytest.log" 2>&1 || over || status=1
  tail -n 15 "$out/pytest.log"
else
  device=cpu workers=0 size=(--images 200 --epochs 2 --model resnet9-relu-0.26M --only clean/undefended clean/ultraclean badnets-5%/NONE)
fi
timeout -k 5 "$(left)" $python -m benchmarks.device_ratios --device $device >"$out/device_ratios.jsonl" || over || status=1
cat "$out/device_ratios.jsonl"
[ -z "$weights" ] || size+=(--weights "$weights")
timeout -k 5 "$(($(left) + 5))" $python -m benchmarks.device --data "$data" --cache "$out/cache" --results "$out/device.jsonl" \
  --device $device --workers $workers --budget "$(($(left) - 15))" "${size[@]}" || over || status=1
exit $status
