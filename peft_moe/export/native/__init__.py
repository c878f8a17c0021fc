"""Block mixtures as native MoE checkpoints: Mixtral, Qwen2-MoE and Qwen3-MoE."""
