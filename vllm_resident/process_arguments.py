"""Arguments that the pool's processes share: controller, ranks, gateway.

Each of them is started by hand, or by `vllm-resident` or a rank on the user's behalf;
what the same words mean stands here once. The command line's own are in `cli`.
"""

from __future__ import annotations

import argparse
import os

from vllm_resident import keys
from vllm_resident.config import CONFIG_VARIABLE
from vllm_resident.keys import KEY_FILE_VARIABLE, PoolKey


def add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pool",
        metavar="NAME",
        default="default",
        help="name of the pool on this machine (default: %(default)s)",
    )


def add_key_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        default=os.environ.get(KEY_FILE_VARIABLE),
        help="the key of a pool on several machines (`vllm-resident key FILE` makes "
        f"one; default: ${KEY_FILE_VARIABLE})",
    )


def add_config(parser: argparse.ArgumentParser, whose: str = "") -> None:
    """`whose` says in a few words who reads it, where that is another process."""
    parser.add_argument(
        "--config",
        metavar="POOL.toml",
        default=os.environ.get(CONFIG_VARIABLE),
        help="what the pool may hold and how much of it: budgets and declared models"
        f"{whose} (default: ${CONFIG_VARIABLE}, else nothing is declared)",
    )


def add_owner_pid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--owner-pid",
        metavar="PID",
        type=int,
        help="stop when this process (say, the launcher of the ranks) ends",
    )


def read_key(options: argparse.Namespace) -> PoolKey | None:
    """The key in `--key-file`, if it was given; `CommandRejected` if that is none."""
    return keys.read(options.key_file) if options.key_file else None
