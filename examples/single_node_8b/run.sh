#!/usr/bin/env bash
# All stages on this node. The same line is every later try: it goes on where the last one ended, whatever ended it.
#
#   examples/single_node_8b/run.sh [FLAG...]       from the checkout; flags are prism-pipeline's, such as --until align
set -euo pipefail

if [[ ! -e runs/8b/judge ]]; then
    python -m prism_megatron convert to-megatron --hf Qwen/Qwen3-VL-2B-Instruct --as discriminator --save runs/8b/judge
fi
# SIGTERM and Ctrl-C reach the stage that plays, which ends after its step with everything saved.
exec python -m prism_megatron pipeline --config examples/single_node_8b/pipeline.yaml --output runs/8b/all \
    --resume auto "$@"
