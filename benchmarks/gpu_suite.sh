#!/usr/bin/env bash
# The GPU list of benchmarks/run.py on one 80 GB GPU: no network, no trl, no datasets. Under 8 minutes a call; runs
# whose result is there already are left out, so calling it again goes on where the last call stopped.
#
#   benchmarks/gpu_suite.sh              tests and checks on the device first, then as many runs as fit
#   benchmarks/gpu_suite.sh --dry-run    the whole list at tiny size on a CPU
#   benchmarks/gpu_suite.sh --list       the list, one run a line
#   ONLY='olmoe|lora'                    only lines that match this
#   OUT=folder                           where results go; benchmarks/results otherwise
#   COMMIT=hash                          what is run, where there is no git to ask
#   BUDGET_S=450 TIMEOUT_S=150           seconds of a call, and of one run
#   AGAIN=1                              also runs that have a result
#
# A run starts only while a whole TIMEOUT_S is left. One that takes longer is recorded as failed.
set -uo pipefail
cd "$(dirname "$0")/.."

# Most telling first. --fit: half the batch, again and again, until it fits; the result says how often.
runs() {
    cat <<'LIST'
--workload qwen1.5_16x2048 --method ours_innovation_tiles
--workload qwen1.5_16x2048 --method hf_checkpointing --fit
--workload qwen1.5_16x2048 --method hf_checkpointing_linear_ce --fit
--workload qwen3_16x2048 --method ours_innovation_tiles
--workload qwen3_16x2048 --method hf_checkpointing_linear_ce --fit
--workload olmoe_16x2048 --method ours_innovation_tiles
--workload olmoe_16x2048 --method hf_checkpointing --fit
--workload olmoe_16x2048 --method hf_checkpointing_linear_ce --fit
--workload qwen1.5_4x512 --method ours_innovation
--workload qwen1.5_4x512 --method ours_innovation_m1
--workload qwen1.5_4x512 --method hf_checkpointing
--workload qwen1.5_4x512 --method hf_plain
--workload qwen1.5_4x512 --method ours_none
--workload qwen1.5_1x32768 --method ours_innovation_tiles
--workload qwen1.5_1x32768 --method hf_checkpointing
--workload qwen1.5_1x32768 --method hf_checkpointing_linear_ce
--workload qwen1.5_128x2048 --method ours_innovation_tiles
--workload qwen1.5_128x2048 --method ours_innovation_tiles_host
--workload qwen1.5_16x2048 --method ours_innovation_tiles_host
--workload qwen3_16x2048 --method ours_innovation_tiles_host
--workload qwen1.5_16x2048 --method ours_none_tiles
--workload qwen1.5_16x2048 --method ours_none
--workload qwen1.5_16x2048 --method ours_innovation
--workload qwen1.5_16x2048 --method hf_checkpointing --fit --step-after-backward
--workload qwen1.5_16x2048 --method hf_checkpointing_offload --fit
--workload qwen1.5_16x2048 --method hf_checkpointing_n --fit
--workload qwen1.5_16x2048 --method hf_plain --fit
--workload qwen1.5_16x2048 --method trl_defaults --fit
--workload qwen1.5_16x2048 --method lora
--workload qwen1.5_16x2048 --method dora --fit
--workload qwen1.5_16x2048 --method ia3
--workload qwen1.5_16x2048 --method lomo
--workload qwen1.5_16x2048 --method galore
--workload qwen1.5_16x2048 --method galore_linear
--workload qwen1.5_16x2048 --method ours_cross_branch_right_tiles
--workload qwen1.5_16x2048 --method ours_cross_branch_right
--workload qwen1.5_16x2048 --method ours_cross_branch_right_maps_tiles
--workload qwen1.5_16x2048 --method ours_cross_branch_right_maps
--workload qwen1.5_16x2048 --method ours_cross_branch_left_tiles
--workload qwen1.5_16x2048 --method ours_cross_branch_left
LIST
}

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
BUDGET_S=${BUDGET_S:-450}
TIMEOUT_S=${TIMEOUT_S:-150}
OUT=${OUT:-benchmarks/results}
ONLY=${ONLY:-.}
selected=$(runs | grep -E -- "$ONLY") || { echo "No run matches ONLY=$ONLY; see --list." >&2; exit 2; }

case "${1:-}" in
    --list)
        echo "$selected"
        exit 0
        ;;
    --dry-run)
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        echo "$selected" | sed "s|$| --tiny --allow-dirty --allow-untested --out $folder|" \
            | "$PYTHON" benchmarks/run.py --from-list -
        wanted=$(echo "$selected" | wc -l)
        there=$(find "$folder" -name 'run_*.json' | wc -l)
        echo "$there of $wanted runs left a result; $(grep -l '"status": "ok"' "$folder"/*.json | wc -l) of them are measurements."
        [ "$there" -eq "$wanted" ]
        exit
        ;;
    "") ;;
    *)
        echo "Unknown option $1. Accepted: --dry-run, --list, or nothing." >&2
        exit 2
        ;;
esac

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "No CUDA device here. benchmarks/gpu_suite.sh --dry-run runs the list on a CPU." >&2
    exit 2
}
mkdir -p "$OUT"
# Gradients, updates, the loss; on the device the tests marked gpu, among them a walk in bf16 with grouped_mm whose
# checksums all match. At once if they were green for this code already.
timeout "$BUDGET_S" "$PYTHON" benchmarks/run.py --tests || { echo "Tests are not green: nothing is measured." >&2; exit 1; }

left=0
failed=0
while read -r line; do
    workload=$(echo "$line" | sed -E 's/.*--workload ([^ ]+).*/\1/')
    method=$(echo "$line" | sed -E 's/.*--method ([^ ]+).*/\1/')
    [[ $line == *--step-after-backward* ]] && method+=_after-backward
    there=$(compgen -G "$OUT/run_*_${workload}_${method}.json"; compgen -G "benchmarks/results/run_*_${workload}_${method}.json")
    [ -z "${AGAIN:-}" ] && [ -n "$there" ] && continue
    if [ $((BUDGET_S - SECONDS)) -lt "$TIMEOUT_S" ]; then
        left=$((left + 1))
        continue
    fi
    # shellcheck disable=SC2086
    timeout --kill-after=15 "$TIMEOUT_S" "$PYTHON" benchmarks/run.py $line --out "$OUT" ${COMMIT:+--commit "$COMMIT"} </dev/null
    [ $? -eq 0 ] || failed=$((failed + 1))
done <<<"$selected"
echo "$SECONDS s; $failed runs failed (their results say why), $left are left for another call."
