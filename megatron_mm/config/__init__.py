"""Typed configuration. Imports neither torch nor numpy, so that a recipe is checked in milliseconds.

errors.py   InputError, what a user sees when something given to us is wrong
schema.py   the sections of a run's config, frozen, unknown keys forbidden
layout.py   which parallel layouts a model and a batch admit
prepare.py  the sources of a data set
flops.py    floating-point operations of a model
loss_blocks.py  rows of the output layer that the loss takes at a time
json_files.py   JSON files that others wrote
names.py    names of settings, and the nearest to one that is none
strict_yaml.py  YAML without surprises
load.py     recipe + files + overrides -> RunConfig, all faults reported at once
"""
