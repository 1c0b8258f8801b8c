"""From a conversation and its pictures to the ids, loss mask and pixels that a model sees.

modes.py       the one owner of mode tokens
tokenizer.py   a Hugging Face tokenizer, checked for what the modes need
images.py      any-res tiling: size -> grid and placeholder count, picture -> tiles
render.py      conversation -> ids and loss mask; prompt -> ids
template.py    the same as a chat template, for serving
"""
