#!/usr/bin/env bash
# One host's part of a stage's run. The same line is the first and every later try.
#
#   run_stage.sh STAGE CONFIG OUTPUT [FLAG...]     STAGE: sft, warm_start, align or rlvr
#
# Read from the environment:
#   NPROC                              ranks of this host
#   NNODES, NODE_RANK                  hosts of the run, and which one this is (1 and 0)
#   MASTER_ADDR, MASTER_PORT           where the first host is reached by all (127.0.0.1 and 29500)
#   MAX_MINUTES                        after which the run is to save and end by itself
#
# SIGTERM is passed on to the ranks of this host, which end after the step under way, with all others. torchrun does not
# hear of it: it would give them 30 seconds. What the host of the first rank is to be signalled by stands in OUTPUT.pid.
#
# Status of the first host: 0 the run is done; 3 it stopped as it was asked to, and the same line goes on; else it failed. Other
# hosts end with 0 in both cases: they may end before the first has written what became of the run.
set -euo pipefail

if (($# < 3)); then
    echo "usage: NPROC=8 $0 STAGE CONFIG OUTPUT [FLAG...]" >&2
    exit 2
fi
stage=$1 config=$2 output=$3
shift 3
node_rank=${NODE_RANK:-${SLURM_PROCID:-0}}

flags=(--config "$config" --output "$output" --resume auto)
if [[ -n ${MAX_MINUTES:-} ]]; then
    flags+=(--max-minutes "$MAX_MINUTES")
fi

launcher=
# shellcheck disable=SC2329 # invoked by the trap
stop_ranks() {
    if [[ -n $launcher ]]; then
        pkill -TERM -P "$launcher" || true # none is left where they have just ended
    fi
}
trap stop_ranks TERM

mkdir -p "$(dirname "$output")"
if ((node_rank == 0)); then
    echo "$$" >"$output.pid"
    trap 'rm -f "$output.pid"' EXIT
fi

torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:?ranks of this host}" --node-rank "$node_rank" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts 0 \
    -m prism_megatron "${stage//_/-}" "${flags[@]}" "$@" &
launcher=$!

# A signal ends the waiting and not the run.
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true
done
status=0
wait "$launcher" || status=$?

# Under torchrun a run that was stopped ends with 0 as well.
if ((status == 0 && node_rank == 0)) && ! grep -q '"ended": "done"' "$output/summary.json"; then
    echo "$output has stopped before its end; the same line goes on" >&2
    status=3
fi
exit "$status"
