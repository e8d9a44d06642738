# Everything here works on a machine with git, make and Python 3.10 or newer.
# PYTHON names another interpreter, VENV another place for its packages, ARGS go to pytest:
#   make test PYTHON=python3.13 VENV=.venv-3.13 ARGS="-x -k heal"

VENV := .venv
READY := $(VENV)/.ready
FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
WHICH := import sys; print(sys.base_prefix, sys.hexversion)

# The first Python on PATH that will do; some systems' python3 is older than 3.10.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$name" -c '$(FITS)' 2>/dev/null && echo "$$name" && exit; done; echo python3)
endif
SAME := $(shell [ "$$($(VENV)/bin/python -c '$(WHICH)' 2>&1)" = "$$($(PYTHON) -c '$(WHICH)' 2>&1)" ] && echo yes)

# What is set outside must not decide how a run in here ends.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE AGENT_TIMEOUT GATE_TIMEOUT

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## An issue becomes a proposal, then a red build is healed (simulated: no agent needed)
	$(VENV)/bin/python agent_runner.py issue-to-pr issues/0001-*.md --simulate good
	$(VENV)/bin/python agent_runner.py self-heal --simulate good

# First their bytecode: a process that compiles them is twice as large, and it is forked thousands of times.
test: lint  ## ruff, then the tests
	@$(VENV)/bin/python -m pytest --collect-only --quiet >/dev/null || true
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY)  ## ruff alone
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff check --isolated agent_runner.py  # as in a repository that it is copied into

# Exit code, command. They run in an empty directory, as they would in a workshop.
define SIMULATIONS
0 issue-to-pr issue.md --simulate good
1 issue-to-pr issue.md --simulate bad
1 issue-to-pr issue.md --simulate stuck
3 issue-to-pr issue.md --simulate cheat
3 issue-to-pr issue.md --simulate rogue
3 issue-to-pr issue.md --simulate blind
4 issue-to-pr issue.md --simulate hang
0 self-heal --simulate good
0 self-heal --simulate bad
2 self-heal --simulate stuck
3 self-heal --simulate cheat
3 self-heal --simulate rogue
3 self-heal --simulate blind
4 self-heal --simulate hang
endef
export SIMULATIONS

simulate: $(READY)  ## Every simulation, and whether its exit code is the right one
	@top=$$(pwd); python=$$(cd $(VENV)/bin && pwd)/python; \
	TMPDIR=$$(mktemp -d) || exit; export TMPDIR; trap 'rm -rf "$$TMPDIR"' EXIT; trap 'exit 130' INT TERM; \
	mkdir "$$TMPDIR/empty"; cd "$$TMPDIR/empty" || exit; \
	echo "$$SIMULATIONS" | { wrong=0; while read -r expected args; do \
		code=0; "$$python" "$$top/agent_runner.py" $$args </dev/null >../out 2>&1 || code=$$?; \
		if [ $$code = $$expected ]; then echo "ok     exit $$code  $$args"; \
		else echo "WRONG  exit $$code, not $$expected  $$args"; cat ../out; wrong=1; fi; \
	done; exit $$wrong; }

red:  ## A small repository with a bug, to be healed: make red DIR=../red
	@[ -n "$(DIR)" ] || { echo "make: name a directory that is not there yet: make red DIR=../red" >&2; exit 1; }
	@[ ! -e "$(DIR)" ] || { echo "make: $(DIR) is there already; name another: make red DIR=../red-2" >&2; exit 1; }
	@cp -R .github/red "$(DIR)" && cp agent_runner.py "$(DIR)"
	@cd "$(DIR)" && git init --quiet && git symbolic-ref HEAD refs/heads/main && git add -A && \
		git -c user.name=Workshop -c user.email=workshop@localhost -c commit.gpgSign=false commit --quiet -m "Sell tea by the piece"
	@echo "two tests are red in $(DIR): cd $(DIR), and heal it"

bench: $(READY)  ## The table of ratios in BENCHMARKS.md (some minutes)
	$(VENV)/bin/python test_agent_runner.py bench

pictures: $(READY)  ## The README's pictures, .github/board.png and run.png (needs Chromium)
	$(VENV)/bin/python test_agent_runner.py pictures

soak: $(READY)  ## 200 simulated runs, ten at a time, killed at random (some minutes)
	$(VENV)/bin/python test_agent_runner.py soak

clean:  ## Remove what make and the tools have made here
	rm -rf $(if $(wildcard $(VENV)/pyvenv.cfg),$(VENV)) .pytest_cache .ruff_cache __pycache__

# Made again when this file changes, or when PYTHON is not the one that it was made with.
$(READY): Makefile $(if $(SAME),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "make: $(PYTHON) is missing or older than 3.10; name a newer one: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(FITS)' 2>/dev/null || { \
		echo "make: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) $(if $(wildcard $(VENV)/pyvenv.cfg),--clear)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest ruff
	@echo '*' > $(VENV)/.gitignore
	@touch $@

FORCE:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint simulate red bench soak clean FORCE
