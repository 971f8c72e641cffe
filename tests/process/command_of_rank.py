"""Prints what a supervisor would start, as JSON: for a test of it."""

import json
import sys

from vllm_resident.rank.supervisor import rank_command

if __name__ == "__main__":
    sys.stdout.write(json.dumps(rank_command()))
