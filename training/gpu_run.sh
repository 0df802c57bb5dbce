#!/usr/bin/env bash
# Train on a GPU for some minutes, from packed shards, going on from what the run's folder holds.
#
#   training/gpu_run.sh --minutes 20 --shards SHARDS --out RUN [--points-share 0.45] [--stage points|matching|both|distil]
#       [--start-points WEIGHTS] [--start-matching WEIGHTS] [-- OPTIONS OF train.py OR distil.py]
#
# Nothing is prepared or fetched: the shards hold everything (training/prepare.py makes them). PyTorch, NumPy and OpenCV
# are needed besides this repository. RUN holds checkpoints to go on from (*.pt), the averaged weights (*.weights.pt, in
# parts of 15 MB as well), and the logs (*.jsonl). The stage distil makes the fast pair, by what the full one says. A
# training begins with the shipped weights, distil with none of its own, or with what --start-* names.
set -euo pipefail
minutes=20 shards= out= share=0.45 stage=both python=${PYTHON:-python3} start_points= start_matching=
extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=$2; shift 2 ;;
    --shards) shards=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --points-share) share=$2; shift 2 ;;
    --stage) stage=$2; shift 2 ;;
    --start-points) start_points=$2; shift 2 ;;
    --start-matching) start_matching=$2; shift 2 ;;
    --) shift; extra=("$@"); break ;;
    *) echo "gpu_run.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
[ -n "$shards" ] && [ -n "$out" ] || { echo "gpu_run.sh: --shards and --out are needed" >&2; exit 2; }
case $stage in points | matching | both | distil) ;; *) echo "gpu_run.sh: there is no stage $stage" >&2; exit 2 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)  # what is named on the command line lies where the caller is
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
points=$(awk -v m="$minutes" -v s="$share" -v stage="$stage" 'BEGIN{print stage == "both" || stage == "distil" ? m * s : m}')
matching=$(awk -v m="$minutes" -v s="$share" -v stage="$stage" 'BEGIN{print stage == "both" || stage == "distil" ? m * (1 - s) : m}')
mkdir -p "$out"
if [ "$stage" = distil ]; then
  for kind in points matching; do  # --width is the matcher's
    start=start_$kind
    "$python" "$root/training/distil.py" $kind --shards "$shards" --out "$out" --minutes "${!kind}" --width 128 \
      ${!start:+--start "${!start}"} "${extra[@]}" 2>&1 | tee -a "$out/$kind.txt"
  done
  exit
fi
if [ "$stage" != matching ]; then
  "$python" "$root/training/train.py" points --shards "$shards" --out "$out" --minutes "$points" --start "${start_points:-superpoint-open}" "${extra[@]}" 2>&1 | tee -a "$out/points.txt"
fi
if [ "$stage" != points ]; then
  "$python" "$root/training/train.py" matching --shards "$shards" --out "$out" --minutes "$matching" --start "${start_matching:-lightglue-superpoint-open}" "${extra[@]}" 2>&1 | tee -a "$out/matching.txt"
fi
