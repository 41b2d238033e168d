# One command each: every target makes its own environment. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
VENV_TRAIN := .venv-train
VENV_FUZZ := .venv-fuzz
VENV_FEDERATION := .venv-federation
BIN := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check --quiet
DEMO_FLAGS ?=
ROBUSTNESS_FLAGS ?=
BENCH_FLAGS ?=
TEST_FLAGS ?=
PEERS_FLAGS ?=
UPDATE_FLAGS ?=
# The smartwatch data lies in this wheel; its own dependencies are not needed to read one file.
DATA := seglearn==1.2.5
# Each ships ONNX files that others exported; again, nothing but those files is used.
WILD := magika==1.0.3 rapidocr-onnxruntime==1.4.4 silero-vad==5.1.2

# Debian's packages, unpacked without root; tests that need what is not there are skipped, and say so.
MOSQUITTO := .mosquitto
MOSQUITTO_PACKAGES := mosquitto mosquitto-clients libmosquitto1 libcjson1 libdlt2 libwrap0

TEST_TOOLS := .test-tools

.PHONY: help deb test-oldest mosquitto test-mosquitto test-tools data robustness demo bench bench-peers demo-update bench-update test-flower test test-again test-unit test-integration test-train test-wheel test-boards test-boot drift fuzz soak check check-all lint clean

help:
	@echo "make demo          ten agents, three of them lying, answer real inputs; one answer is checked offline"
	@echo "make bench         what verification costs: the whole path with and without it, and onnxruntime alone"
	@echo "make bench-peers   the same expert served by us, verified, and by hivemind, KServe and Ray Serve"
	@echo "make demo-update   a better expert goes to ten agents under load; three broken releases stop at the canary"
	@echo "make bench-update  what it costs to bring a 5 MB expert to 3 and to 10 agents over Flower"
	@echo "make robustness    how many liars each policy bears, on Fashion-MNIST (make data fetches it)"
	@echo "make test          unit and integration tests (no torch)"
	@echo "make mosquitto     fetch the Mosquitto broker and its clients for the integration tests (Debian, no root)"
	@echo "make test-tools    fetch promtool, libfaketime, dosfstools, mtools and fdisk for the tests (Debian, no root)"
	@echo "make test-mosquitto  the tests of whole fleets once more, with Mosquitto as broker"
	@echo "make test-train    train the built-in model anew, briefly (torch)"
	@echo "make test-wheel    build the wheel and use it in an empty environment"
	@echo "make test-boards   emulated Raspberry Pi 3, 4 and 5 in a fleet with x86 agents (Debian, no root)"
	@echo "make test-boot     flashed images boot as whole emulated boards, join, answer, outlive power cuts"
	@echo "make drift         measure anew how far boards and x86 are apart, into docs/results/drift.md"
	@echo "make fuzz          strike every decoder with hostile bytes, guided by coverage, FUZZ_SECONDS (60) each"
	@echo "make test-flower   releases over Flower: attacks, deaths, outages (minutes)"
	@echo "make soak          twenty demos in a row, with twenty seeds"
	@echo "make deb           the agent as Debian packages, arm64 and amd64, with all that it needs inside"
	@echo "make test-oldest   the unit tests of agent, protocol, rules and inference on Python 3.10"
	@echo "make lint          ruff, mypy and the import contract"
	@echo "make check-all     everything"

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -e '.[dev]'
	$(BIN)/pip install $(PIP_FLAGS) --no-deps $(DATA) $(WILD)
	@touch $@

$(VENV_TRAIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_TRAIN)
	$(VENV_TRAIN)/bin/pip install $(PIP_FLAGS) torch==2.13.0 numpy onnx onnxruntime pytest pytest-asyncio
	$(VENV_TRAIN)/bin/pip install $(PIP_FLAGS) --no-deps $(DATA)
	@touch $@

# atheris has no wheel for ARM, and nothing but this needs it.
$(VENV_FUZZ)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_FUZZ)
	$(VENV_FUZZ)/bin/pip install $(PIP_FLAGS) -e '.[dev]' 'atheris>=3'
	@touch $@

$(MOSQUITTO)/.ready: Makefile
	rm -rf $(MOSQUITTO)
	mkdir -p $(MOSQUITTO)/packages
	cd $(MOSQUITTO)/packages && timeout 120 apt-get download $(MOSQUITTO_PACKAGES)
	for package in $(MOSQUITTO)/packages/*.deb; do dpkg-deb -x "$$package" $(MOSQUITTO); done
	@touch $@

mosquitto: $(MOSQUITTO)/.ready

$(TEST_TOOLS)/.ready: Makefile
	rm -rf $(TEST_TOOLS)
	mkdir -p $(TEST_TOOLS)
	cd $(TEST_TOOLS) && timeout 120 apt-get download prometheus libfaketime dosfstools mtools fdisk
	cd $(TEST_TOOLS) && for package in *.deb; do dpkg-deb -x "$$package" . && rm "$$package"; done
	@touch $@

test-tools: $(TEST_TOOLS)/.ready

# Fashion-MNIST as Debian packs it: needed to train `fashion` and to measure on it, by neither demo nor test.
.data/.ready:
	rm -rf .data
	mkdir -p .data/packages
	cd .data/packages && timeout 300 apt-get download dataset-fashion-mnist
	dpkg-deb -x .data/packages/*.deb .data
	@touch $@

data: .data/.ready

robustness: $(VENV)/.ready .data/.ready
	$(BIN)/python -m benchmarks.robustness $(ROBUSTNESS_FLAGS)

demo: $(VENV)/.ready
	@$(BIN)/python -m benchmarks.demo $(DEMO_FLAGS)

# A peer that does not install is skipped, and the comparison says why.
PEERS := hivemind kserve ray
PEER_hivemind := torch==2.13.0 hivemind==1.1.12
PEER_kserve := kserve==0.21.0
PEER_ray := ray[serve]==2.60.0

$(PEERS:%=.venv-%/.tried): .venv-%/.tried:
	$(PYTHON) -m venv $(@D)
	@echo "installing $* into $(@D)"
	@if $(@D)/bin/pip install $(PIP_FLAGS) $(PEER_$*) numpy onnxruntime > $(@D)/.why 2>&1; then touch $(@D)/.ready; fi
	@touch $@

bench-peers: $(VENV)/.ready $(PEERS:%=.venv-%/.tried)
	@$(BIN)/python -m benchmarks.peers $(PEERS_FLAGS)

# An environment of its own: flwr wants older releases of FastAPI, typer and rich than the rest is tested with.
$(VENV_FEDERATION)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_FEDERATION)
	$(VENV_FEDERATION)/bin/pip install $(PIP_FLAGS) -e '.[dev,federation]'
	$(VENV_FEDERATION)/bin/pip install $(PIP_FLAGS) --no-deps $(DATA)
	@touch $@

demo-update: $(VENV_FEDERATION)/.ready
	@$(VENV_FEDERATION)/bin/python -m benchmarks.update_demo $(UPDATE_FLAGS)

bench-update: $(VENV_FEDERATION)/.ready
	@$(VENV_FEDERATION)/bin/python -m benchmarks.update_bench $(UPDATE_FLAGS)

# Whole fleets with a SuperLink and SuperNodes: minutes, not seconds.
test-flower: $(VENV_FEDERATION)/.ready
	$(VENV_FEDERATION)/bin/python -m pytest tests/flower $(TEST_FLAGS)

bench: $(VENV)/.ready
	@$(BIN)/python -m benchmarks.bench $(BENCH_FLAGS)

test: $(VENV)/.ready
	-@$(MAKE) --no-print-directory mosquitto test-tools
	$(BIN)/python -m pytest tests/unit tests/integration

# Real processes on a shared machine can miss a deadline once; what fails twice is broken.
test-again: $(VENV)/.ready
	$(BIN)/python -m pytest tests/unit tests/integration --last-failed --last-failed-no-failures none

test-unit: $(VENV)/.ready
	$(BIN)/python -m pytest tests/unit

test-integration: $(VENV)/.ready
	-@$(MAKE) --no-print-directory mosquitto test-tools
	$(BIN)/python -m pytest tests/integration

# What the agents' broker carries, on the other broker. Tests of NATS itself say so and are skipped.
FLEET_TESTS := attacks attacks_collusion attacks_join faults identity_fleet releases sensor_requests
test-mosquitto: $(VENV)/.ready mosquitto
	BMOE_TEST_BROKER=mosquitto $(BIN)/python -m pytest $(FLEET_TESTS:%=tests/integration/test_%.py) $(TEST_FLAGS)

# JetPack 6 has Python 3.10, for which onnxruntime ends with 1.23: what runs on a board must run there.
VENV_310 := .venv-3.10
TESTS_310 := agent_admit agent_board agent_complain agent_handover agent_install agent_jobs agent_logs agent_outbox agent_systemd checkpoint combine \
  commitments encoding envelope golden inference inference_faults keys manifest merkle messages policies providers rules_answers \
  rules_claims rules_complaints rules_credit rules_fold rules_membership rules_replay rules_verdicts source source_folder standing \
  tensors tlog_proof topics voting wycheproof
$(VENV_310)/.ready: pyproject.toml
	python3.10 -m venv $(VENV_310)
	$(VENV_310)/bin/pip install $(PIP_FLAGS) -e '.[agent]' hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@

test-oldest: $(VENV_310)/.ready
	$(VENV_310)/bin/python -m pytest $(TESTS_310:%=tests/unit/test_%.py)

test-train: $(VENV_TRAIN)/.ready
	PYTHONPATH=. OMP_NUM_THREADS=1 $(VENV_TRAIN)/bin/python -m pytest tests/train

test-wheel: $(VENV)/.ready
	$(BIN)/python -m pytest tests/wheel

# qemu-user and the boards' aarch64 packages are fetched into ~/.cache/bmoe/emulate once. Those of another release of Debian
# than this machine's are tested with whole boards, where minutes count less.
OTHER_RELEASE := test_other_release.py
test-boards: $(VENV)/.ready
	$(BIN)/python -m pytest tests/boards --ignore tests/boards/$(OTHER_RELEASE) --timeout 600 --durations 5

# Whole boards: images, flash, boot, join, power cuts. What is not installed of QEMU and the tools of file systems is fetched.
test-boot: $(VENV)/.ready
	$(BIN)/python -m pytest tests/boot tests/boards/$(OTHER_RELEASE) --timeout 1500 --durations 5 -s

drift: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/boards/drift_table.py

fuzz: $(VENV_FUZZ)/.ready
	$(VENV_FUZZ)/bin/python tests/fuzz/run.py

soak: $(VENV)/.ready
	@for seed in $$(seq 1 20); do \
	  $(BIN)/python -m benchmarks.demo --plain --seed $$seed | tail -n 1 || { echo "seed $$seed failed"; exit 1; }; done

deb: $(VENV)/.ready
	$(BIN)/python firmware_configs/deb/build.py --arch arm64
	$(BIN)/python firmware_configs/deb/build.py --arch amd64

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bmoe edge_agent coordinator
	$(BIN)/lint-imports

check: lint test

check-all: lint test test-train test-wheel soak

clean:
	rm -rf $(VENV) $(VENV_TRAIN) $(VENV_FUZZ) $(VENV_FEDERATION) $(MOSQUITTO) $(TEST_TOOLS) build dist *.egg-info
