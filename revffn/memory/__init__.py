"""What a step takes, and what fits.

amounts.py     amounts of memory, read and written
answers.py     what the planner answers
disk.py        what has been measured, kept between processes
live_bytes.py  bytes of live tensors while a step runs, by part
ranks.py       one rank of several, without the others
simulation.py  one step on fake tensors
fake.py        fake tensors, sooner
measure.py     a model's sizes, and its step at full depth from one of a few layers
predict.py     the step of any batch and length
wire.py        what ranks send to each other
plan.py        what fits, which tile, how many kept layers, what else would
question.py    all that `revffn plan` is asked
command.py     `revffn plan`: the answers as tables, JSON and a picture
"""
