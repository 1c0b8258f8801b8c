"""What is a response worth? No torch here: graders run in small processes.

formats.py       the form of a response, and the answer in it
answers.py       comparing an answer with the reference: the kinds of answers
choices.py       multiple choice
characters.py    characters that mean what plainer ones do
quantities.py    numbers with units
written.py       ranges, dates, times and the like, which are not computed
expressions.py   mathematics, through math-verify
rewards.py       specs of rewards, grades, plug-ins
workers.py       grading a batch in processes of its own
keeper.py        such a process
"""
