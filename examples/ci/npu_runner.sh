#!/usr/bin/env bash
# A CI job on an Ascend runner: what the machine's NPUs allow, and one report.
#
#   source set_env.sh of CANN, then: pip install -e '.[npu]' pytest &&
#   examples/ci/npu_runner.sh
#
# Where there is no NPU it says so and passes. PYTHON names the environment's python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ ! -e /dev/davinci_manager ]; then
    echo "no NPU on this runner (no /dev/davinci_manager): nothing was run"
    exit 0
fi
exec make --no-print-directory gpu PYTHON="${PYTHON:-python3}"
