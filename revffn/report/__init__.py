"""`revffn report`: one self-contained page about a run, or several side by side.

record.py          a run's folder, read
weight_changes.py  how far each module's weights have moved from the base model's
figures.py         the figures, by plotly
page.py            figures and tables into one HTML file
templates/         its HTML
command.py         `revffn report`
"""
