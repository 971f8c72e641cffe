"""Programs that use vllm-resident from the outside, each run by a test."""
