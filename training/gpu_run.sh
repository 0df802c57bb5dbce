#!/usr/bin/env bash
# Train on a GPU for some minutes, from packed shards. The same command continues from the checkpoints in RUN.
#
#   training/gpu_run.sh --minutes 20 --shards SHARDS --out RUN [--points-share 0.45]
#       [--stage points|matching|both|distil|rank] [--start-points WEIGHTS] [--start-matching WEIGHTS]
#       [-- OPTIONS OF train.py, distil.py OR rank.py]
#
# It needs the shards (training/prepare.py), PyTorch, NumPy and OpenCV, and fetches nothing. RUN holds the checkpoints
# (*.pt), the averaged weights (*.weights.pt, also in parts of 15 MB) and the logs (*.jsonl). The stages points and
# matching start from the shipped weights, or from those of --start-*. The stage distil makes the fast pair from the
# full one. It starts from --start-*, or from random weights for points and a narrowed teacher for matching. The stage
# rank trains which points of a SuperPoint are the best ones, with new views in every step.
#
# Batches are those of the recipe (README.md, runs.md): 16 pairs for points, 32 for matching, 8 for rank, and for distil 4
# small pairs for points and 32 for matching. Options after -- replace them, in every stage that runs.
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
[ -n "$shards" ] && [ -n "$out" ] || { echo "gpu_run.sh: --shards and --out are required" >&2; exit 2; }
case $stage in
  points | matching | both | distil | rank) ;;
  *) echo "gpu_run.sh: unknown stage $stage; choose points, matching, both, distil or rank" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)  # without changing the folder: paths on the command line are relative to it
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
points=$(awk -v m="$minutes" -v s="$share" -v stage="$stage" 'BEGIN{print stage == "both" || stage == "distil" ? m * s : m}')
matching=$(awk -v m="$minutes" -v s="$share" -v stage="$stage" 'BEGIN{print stage == "both" || stage == "distil" ? m * (1 - s) : m}')
mkdir -p "$out"
if [ "$stage" = rank ]; then
  "$python" "$root/training/rank.py" --shards "$shards" --out "$out" --minutes "$minutes" --batch 8 --batches 0 \
    --start "${start_points:-superpoint-open}" "${extra[@]}" 2>&1 | tee -a "$out/ranking.txt"
  exit
fi
if [ "$stage" = distil ]; then
  # Points: 4 pairs of 320 x 240 (run 2 of the fast SuperPoint). Matching: run 4 of the fast LightGlue, which is shipped.
  # Its 600 batches take some 65 GB of GPU memory (computed), most of it for the teacher's states after nine layers.
  # With -- --batch 8 they take a quarter of that.
  recipe_points="--batch 4" recipe_matching="--width 128 --batch 32 --size 640 480 --keypoints 512 --batches 600"
  for kind in points matching; do
    start=start_$kind recipe=recipe_$kind
    # shellcheck disable=SC2086  # a recipe is several words
    "$python" "$root/training/distil.py" $kind --shards "$shards" --out "$out" --minutes "${!kind}" ${!recipe} \
      ${!start:+--start "${!start}"} "${extra[@]}" 2>&1 | tee -a "$out/$kind.txt"
  done
  exit
fi
if [ "$stage" != matching ]; then
  "$python" "$root/training/train.py" points --shards "$shards" --out "$out" --minutes "$points" --batch 16 \
    --start "${start_points:-superpoint-open}" "${extra[@]}" 2>&1 | tee -a "$out/points.txt"
fi
if [ "$stage" != points ]; then
  "$python" "$root/training/train.py" matching --shards "$shards" --out "$out" --minutes "$matching" --batch 32 \
    --start "${start_matching:-lightglue-superpoint-open}" "${extra[@]}" 2>&1 | tee -a "$out/matching.txt"
fi
