"""What a step takes, and what fits.

simulation.py  one step on fake tensors: live bytes by part
predict.py     the same from small simulations, counted and extended
plan.py        what fits, which tile, what else would
command.py     `revffn plan`: the answers as tables, JSON and a picture
"""
