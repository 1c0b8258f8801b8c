"""megatron_mm trains multimodal models that decide by themselves when to think."""

__version__ = "0.1.0"
