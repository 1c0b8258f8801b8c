"""Between Hugging Face directories and checkpoints, and whether two of them hold the same.

Conversion goes parameter by parameter and needs no live model: one parameter is in memory at a time on the way out,
each rank's share of the model on the way in.

checkpoint_weights.py   a checkpoint's weights by Hugging Face name
importing.py            Hugging Face directories -> checkpoint
exporting.py            checkpoint -> Hugging Face directory
verify.py               two of either kind, compared to the bit
"""
