"""What a run says of itself.

run.py         the run directory: config.yaml, metrics.jsonl, TensorBoard, W&B, and lines on the terminal
"""
