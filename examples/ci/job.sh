# What both runners do, with NUM_RANKS ranks and `vllm-resident` on the PATH: start a
# pool, load, generate, switch to another model and back onto all ranks, compare, shut
# down, and look that nothing is left.
set -euo pipefail

export VLLM_RESIDENT_DIR
VLLM_RESIDENT_DIR=$(mktemp -d "${TMPDIR:-/tmp}/vr-ci-XXXX")
cleanup() {
    status=$?
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        echo "the job failed; the ends of the pool's logs:" >&2
        tail -n 15 "$VLLM_RESIDENT_DIR"/*/logs/*.log >&2 || true
        vllm-resident shutdown >&2 || true
    fi
    rm -rf "$VLLM_RESIDENT_DIR"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

load() { # NAME MODEL NUM_RANKS
    vllm-resident load "$1" "$2" --num-ranks "$3" --tensor-parallel-size "$3" \
        --dtype float32 --enforce-eager --max-model-len 256 \
        --kv-cache-memory-bytes 67108864
}
answer() { # NAME
    vllm-resident generate "$1" "hello world" "the quick brown fox" --json \
        --temperature 0 --max-tokens 16 |
        python -c 'import json, sys
print([c["token_ids"] for c in json.load(sys.stdin)["completions"]])'
}

models=$(python -m examples.checkpoints llama qwen3)
llama=$(head -n 1 <<<"$models")
qwen3=$(tail -n 1 <<<"$models")

vllm-resident up --detach --nproc-per-node "$NUM_RANKS"
load first "$llama" 1
before=$(answer first)
vllm-resident unload first
load other "$qwen3" 1
answer other >/dev/null
vllm-resident unload other
load again "$llama" "$NUM_RANKS"
after=$(answer again)
vllm-resident shutdown

if [ "$before" != "$after" ]; then
    echo "outputs differ: $before before, $after on $NUM_RANKS ranks" >&2
    exit 1
fi
echo "tokens on 1 and on $NUM_RANKS ranks are the same: $after"

left=$(find /dev/shm -maxdepth 1 -name '*vr[0-9]*x[0-9]*-*' -user "$(id -u)" \
    -newer "$VLLM_RESIDENT_DIR/default" 2>/dev/null || true)
if [ -n "$left" ] || [ -e "$VLLM_RESIDENT_DIR/default/controller.sock" ]; then
    echo "the pool left something behind: $left" >&2
    exit 1
fi
echo "passed; nothing left behind"
