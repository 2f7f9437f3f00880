"""`revffn train`: two stages on TRL's SFTTrainer.

heldout.py    held-out loss, an answer, bytes of a step
preflight.py  a run, checked before weights are loaded
trainer.py    the run
"""
