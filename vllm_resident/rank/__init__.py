"""The process that owns one device: worlds, engines, lockstep, the command loop.

Started as `torchrun ... -m vllm_resident.rank`; SPMD scripts use `rank.spmd` instead.
"""
