"""The sparse feed-forward: our experts, our router's bookkeeping and what is read off it, inside Megatron-Core's MoELayer."""
