#!/usr/bin/env bash
# One SGLang server on this host, for a run's --rollout-urls. It is started again whenever it ends, until SIGTERM.
#
#   serve_policy.sh FOLDER CONTEXT_LENGTH          FOLDER: the Hugging Face folder of a model of the policy's sizes
#
# Read from the environment:
#   PRISM_ROLLOUT_API_KEY              the key that the run has in a variable of the same name
#   SERVER_TP, SERVER_PORT             GPUs that share the model (8), and where it listens (30000)
#   SGLANG_PYTHON                      interpreter of SGLang's own environment (.venv-sglang/bin/python)
set -euo pipefail

folder=${1:?folder of the model} context_length=${2:?prompt and answer, in tokens}

# Arguments on a command line can be read by everyone on the host, and the key is one of them.
umask 077
arguments=$(mktemp --suffix .yaml)
trap 'rm -f "$arguments"' EXIT
cat >"$arguments" <<YAML
model-path: "$folder"
host: 0.0.0.0
port: ${SERVER_PORT:-30000}
tp-size: ${SERVER_TP:-8}
dtype: bfloat16
context-length: $context_length
skip-server-warmup: true
api-key: "${PRISM_ROLLOUT_API_KEY:?the key of the servers}"
YAML

server=
stop() {
    stopped=1
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null || true
    fi
}
stopped=
trap stop TERM

while [[ -z $stopped ]]; do
    # The features of images that it has seen would survive an update of the weights.
    SGLANG_VLM_CACHE_SIZE_MB=0 "${SGLANG_PYTHON:-.venv-sglang/bin/python}" -m sglang.launch_server \
        --config "$arguments" &
    server=$!
    while kill -0 "$server" 2>/dev/null; do
        wait "$server" || true
    done
    if [[ -z $stopped ]]; then
        echo "the server has ended and is started again" >&2
        sleep "${SERVER_PAUSE:-10}"
    fi
done
