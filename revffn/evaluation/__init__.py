"""`revffn evaluate`: scores with intervals, and tables of runs.

harness.py     MMLU, GSM8K, MGSM through lm-evaluation-harness, from local files
mt_bench.py    answers, and a judge behind a URL
perplexity.py  of any text
command.py     one model's scores, and several models' side by side
chat.py        questions that a person asks
tasks/         task files for the harness
"""
