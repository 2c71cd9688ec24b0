#!/usr/bin/env bash
# Queues the stages one after the other; each begins when the one before is done. From the checkout.
set -euo pipefail

if [[ ! -e runs/30b/judge ]]; then
    python -m prism_megatron convert to-megatron --hf Qwen/Qwen3-VL-2B-Instruct --as discriminator --save runs/30b/judge
fi
before=()
for stage in sft warm_start align rlvr; do
    job=$(sbatch --parsable "${before[@]}" examples/slurm_30b_a3b/stage.sbatch "$stage")
    echo "$stage: job $job"
    before=(--dependency="afterok:$job")
done
