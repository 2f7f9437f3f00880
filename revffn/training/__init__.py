"""`revffn train`: two stages on TRL's SFTTrainer.

lock.py           one run in a folder at a time
checkpoint.py     checkpoints that are complete or not counted
best.py           early stopping and the best checkpoint, by held-out losses
resume.py         going on with a run: from what, and whether it is the same run
ending.py         how a run ends that does not come to its end: one line
router_health.py  how evenly routers spread tokens, and what they have changed
heldout.py        held-out loss, an answer, bytes of a step
room.py           what a run is predicted to take: tiles, memory, disk
preflight.py      a run, checked before weights are loaded
introduction.py   what a run says before it loads weights
several.py        what the trainer does as one of several processes
progress.py       how far a stage is: a bar, or a few lines
trainer.py        RevFFNTrainer, and what is logged
results.py        what a run measured: run.json and the table at its end
beginning.py      how a run gets its model, alone or in shards
run.py            the run: conversion, two stages, the saved model
"""
