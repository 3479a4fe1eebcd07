"""Client of the vLLM batch server: generated stubs in `vllm_batch.v1`, the command line in `vllm_batch.cli`."""

__version__ = "0.1.0"
