"""The sparse feed-forward inside Megatron-Core's MoELayer: our experts, our router and its bookkeeping."""
