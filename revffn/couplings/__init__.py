"""What makes a layer reversible.

    fixed_point.py   the inverse of the paper's attention: an iteration, made exact by low bits
    steps.py         one layer's move of the streams: innovation, none
    cross_branch.py  the paper's layer: two half-width streams
    calibration.py   grids, predictors and adapters from a few batches, in closed form
"""
