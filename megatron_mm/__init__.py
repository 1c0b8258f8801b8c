"""megatron_mm trains multimodal models that decide by themselves when to think."""
