#!/usr/bin/env bash
# The body of a Slurm job that plays a stage on its nodes, and is queued again until the stage is done.
#
#   slurm_stage.sh STAGE CONFIG OUTPUT [FLAG...]
#
# Read from the environment, beside Slurm's own variables:
#   NPROC                              ranks of a node
#   SERVER_NODES                       last nodes of the job that train nothing and serve the policy, one server each (0)
#   SERVER_MODEL, CONTEXT_LENGTH       what they serve, as serve_policy.sh takes it
#   CONTAINER_IMAGE, CONTAINER_MOUNTS  for srun with pyxis; without an image the node's own environment is used
#   MAX_MINUTES                        as run_stage.sh takes it
#
# The job's script gets SIGTERM ahead of the time limit (#SBATCH --signal=B:TERM@...). It hands it to the first node's
# run_stage.sh, all ranks end after the step under way with everything saved, and the job goes back into the queue. A run
# that ends by MAX_MINUTES does the same. A stage that failed is not queued again.
set -euo pipefail

stage=$1 config=$2 output=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
servers=${SERVER_NODES:-0}
NNODES=$((${#nodes[@]} - servers))
MASTER_ADDR=${nodes[0]}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export NNODES MASTER_ADDR MASTER_PORT NPROC
training=$(IFS=,; echo "${nodes[*]:0:NNODES}")
serving=$(IFS=,; echo "${nodes[*]:NNODES}")

step=(srun --ntasks-per-node=1 --kill-on-bad-exit=1)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$PWD")
fi

flags=("$@")
served=
if ((servers > 0)); then
    PRISM_ROLLOUT_API_KEY=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export PRISM_ROLLOUT_API_KEY
    "${step[@]}" --nodes="$servers" --nodelist="$serving" \
        "$here/serve_policy.sh" "$SERVER_MODEL" "$CONTEXT_LENGTH" &
    served=$!
    flags+=(--rollout sglang --rollout-urls)
    for node in "${nodes[@]:NNODES}"; do
        flags+=("http://$node:30000")
    done
fi

rm -f "$output.pid" # of a try that was killed
# shellcheck disable=SC2329 # invoked by the trap
stop_run() {
    if [[ -f $output.pid ]]; then
        kill -TERM "$(<"$output.pid")" || true # this script runs on the first node, and so does that process
    fi
}
trap stop_run TERM

"${step[@]}" --nodes="$NNODES" --nodelist="$training" "$here/run_stage.sh" "$stage" "$config" "$output" "${flags[@]}" &
trained=$!
while kill -0 "$trained" 2>/dev/null; do
    wait "$trained" || true
done
status=0
wait "$trained" || status=$?

if [[ -n $served ]]; then
    kill -TERM "$served" 2>/dev/null || true
fi
if ((status == 3)); then
    echo "job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
