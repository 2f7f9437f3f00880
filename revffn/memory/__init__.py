"""What a step takes, and what fits.

amounts.py     amounts of memory, read and written
live_bytes.py  bytes of live tensors while a step runs, by part
simulation.py  one step on fake tensors
predict.py     the same from small simulations, counted and extended
plan.py        what fits, which tile, what else would
command.py     `revffn plan`: the answers as tables, JSON and a picture
"""
