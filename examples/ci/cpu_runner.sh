#!/usr/bin/env bash
# A CI job on a CPU runner: two ranks, real vLLM, nothing left behind.
#
#   examples/ci/cpu_runner.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ -x .venv/bin/vllm-resident ] || make venv
export PATH="$PWD/.venv/bin:$PATH"
NUM_RANKS=2 exec bash examples/ci/job.sh
