"""Is an answer right? No torch here: graders run in small processes.

answers.py     comparing an answer with the reference
"""
