"""Our delta on Megatron-Core: the vpMoE model, optimizer, data reader, objectives and the one training loop."""
