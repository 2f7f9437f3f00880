"""What a command prints is its own: of the libraries' bars and lines only those that a user can act on come through.

Run: pytest tests/test_quiet.py
"""

import json
import logging
import subprocess
import sys

from transformers.utils import logging as of_transformers

from revffn.quiet import NOISE, without_bars, without_noise


def test_noise_is_left_out_and_warnings_come_through(caplog):
    with without_noise():
        for name, text in NOISE.items():
            logging.getLogger(name).warning("%s", f"about {text} and more")
            logging.getLogger(name).warning("a real warning")
    assert [record.getMessage() for record in caplog.records] == ["a real warning"] * len(NOISE)
    for name, text in NOISE.items():
        logging.getLogger(name).warning(text)
    assert len(caplog.records) == 2 * len(NOISE)  # as before


def test_bars_come_back():
    before = of_transformers.is_progress_bar_enabled()
    with without_bars():
        assert not of_transformers.is_progress_bar_enabled()
    assert of_transformers.is_progress_bar_enabled() == before


def test_commands_print_what_is_theirs(recipe_file, tmp_path):
    """In a process of its own, where the libraries are imported first: training, export, a measurement, a chat."""
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("red green blue one two tree house river\n" * 20)
    evaluate = ["evaluate", run, "--tasks", "perplexity", "--text", text, "--window", "32", "--output"]
    words = [
        ["train", recipe_file(), "--training.save_steps", "2", "--evaluation.prompt", "Say red.", "--training.seed=1"],
        ["export", run, tmp_path / "plain"],
        [*evaluate, tmp_path / "scores.json"],
        ["chat", run, tmp_path / "plain", "--max_new_tokens", "4"],
    ]
    words = json.dumps([[str(word) for word in command] for command in words])
    code = f"import sys; sys.argv[0] = 'revffn'; from revffn.__main__ import main; print([main(w) for w in {words}])"
    done = subprocess.run([sys.executable, "-c", code], input="Say red.\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[0, 0, 0, 0]\n")
    assert done.stderr and all(line.startswith("stage 2: step ") for line in done.stderr.splitlines()), done.stderr
    assert "\r" not in done.stdout
