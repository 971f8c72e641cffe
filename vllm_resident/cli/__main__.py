"""`python -m vllm_resident.cli`: the same as the console command."""

import sys

from vllm_resident.cli import main

sys.exit(main())
