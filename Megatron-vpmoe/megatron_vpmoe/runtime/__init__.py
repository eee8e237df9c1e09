"""Where the run meets the machine: the CPU answers for Megatron-Core, process groups, seeds and signals."""
