"""`revffn train`: two stages on TRL's SFTTrainer.

heldout.py    held-out loss, an answer, bytes of a step
preflight.py  a run, checked before weights are loaded
trainer.py    RevFFNTrainer, and what is logged
results.py    what a run measured: run.json and the table at its end
run.py        the run: conversion, two stages, the saved model
"""
