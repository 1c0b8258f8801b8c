"""What is a response worth? No torch here: graders run in small processes.

formats.py       the form of a response, and the answer in it
answers.py       comparing an answer with the reference: the kinds of answers, and in which order they are judged
question.py      what a question asks for: a unit, a name, an order, a text to be read off
characters.py    characters that mean what plainer ones do
wrappings.py     what stands around an answer
sentences.py     the one answer that a sentence holds
choices.py       multiple choice
texts.py         words, and lists of them
codes.py         codes, plates, versions, telephone numbers
times.py         times of day and dates
chemistry.py     formulas and equations of chemistry
written.py       ranges, ratios, numbers in a base, remainders: what is not computed
numerals.py      numbers in words
units.py         units, through pint; money, counted things, Chinese names
quantities.py    numbers with units, and tolerances
expressions.py   mathematics: lists, tuples, names, units behind expressions
equations.py     which equations say a value
solutions.py     sets of numbers, inequalities
symbolic.py      single expressions, through latex2sympy2_extended and sympy
rewards.py       specs of rewards, grades, plug-ins
workers.py       grading a batch in processes of its own
keeper.py        such a process
"""
