#!/usr/bin/env bash
# A CI job on a GPU runner: what its GPUs allow, with one report; then a pool with a
# rank for each of them, nothing left behind.
#
#   pip install -e '.[cuda]' pytest && examples/ci/gpu_runner.sh
#
# Where there is no GPU it says so and passes: the same pipeline runs on both kinds.
# PYTHON names the environment's python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Not counted in a pipeline: pipefail would end the job where the driver is not there.
gpus=$(nvidia-smi -L 2>/dev/null || true)
NUM_RANKS=$(grep -c '^GPU ' <<<"$gpus" || true)
if [ "$NUM_RANKS" -eq 0 ]; then
    echo "no NVIDIA GPU on this runner (nvidia-smi lists none): nothing was run"
    exit 0
fi
if ! command -v vllm-resident >/dev/null; then
    echo "there is a GPU but no vllm-resident: pip install -e '.[cuda]'" >&2
    exit 1
fi
make --no-print-directory gpu PYTHON="${PYTHON:-python3}"
# The tiny model's heads divide by two, not by more.
[ "$NUM_RANKS" -le 2 ] || NUM_RANKS=2
export NUM_RANKS
exec bash examples/ci/job.sh
