# make demo: build everything, then run the real node on a camera bag. make help: all targets.
PYTHON ?= python3
# The ROS distribution: jazzy, or one with a requirements file of its own.
ROS    ?= jazzy
SUFFIX := $(if $(filter jazzy,$(ROS)),,-$(ROS))
REQUIREMENTS := $(if $(SUFFIX),requirements$(SUFFIX).txt,requirements-dev.txt)
VENV   := .venv$(SUFFIX)
BIN    := $(abspath $(VENV))/bin
INSTALL  := install$(SUFFIX)
MESSAGES := $(INSTALL)/kpmatch_ros/share/kpmatch_ros/package.xml
export ROS
# CMake refuses to export the include folder of a NumPy that lies below the source folder, as .venv/ does: colcon
# is shown a copy of the package's parts.
BUILD    := build$(SUFFIX)
STAGE    := $(BUILD)/source/kpmatch_ros
PARTS    := CMakeLists.txt LICENSE config foxglove kpmatch_ros launch msg package.xml rviz scripts src srv
SOURCES  := $(shell find kpmatch_ros launch config foxglove msg rviz scripts src srv -type f -not -name '*.pyc') CMakeLists.txt package.xml

# The tests that another distribution may answer otherwise.
ROS_TESTS := test/test_distributions.py test/test_node.py test/test_node_exit.py test/test_node_requests.py test/test_stereo_node.py \
  test/test_replay.py::test_poses_of_a_camera_walk_agree_with_the_truth

.PHONY: help demo test test-ros soak gpu aarch64 env build lint docs demo-bag clean

demo: build  ## the node on a camera bag, its poses against the truth, and a picture
	tools/with_ros kpmatch demo

test: build  ## every test; pass pytest's arguments with ARGS=
	tools/with_ros pytest $(ARGS)

# Nodes mostly wait: for each other, and for diagnostics once a second. So four at a time, whichever file they are of.
test-ros: build  ## the tests that touch ROS; ROS=kilted
	tools/with_ros pytest -n 4 --dist worksteal $(ROS_TESTS) $(ARGS)

soak: build  ## an hour of overload and faults, with a table of what came of it; ARGS="--minutes 10"
	tools/with_ros python test/soak.py $(ARGS)

aarch64: build  ## the compiled part's tests for ARM: compiled by Clang, run by an emulator
	$(BIN)/pip install --quiet --disable-pip-version-check ziglang==0.17.1 unicorn==2.1.4 pyelftools==0.33
	tools/with_ros python test/aarch64.py $(ARGS)

# With another Python, given as PYTHON=, it needs neither ROS nor the environment of make env.
gpu: $(if $(filter file,$(origin PYTHON)),$(VENV)/.ready)  ## tests and benchmark on a GPU; OUT= for JSON and table
	PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	  $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --out $(or $(OUT),gpu) $(ARGS)

env: $(VENV)/.ready  ## the Python environment with ROS 2 in .venv/, or with ROS=kilted in .venv-kilted/

build: $(MESSAGES)  ## the ROS package in install/, or install-kilted/

lint: env  ## layout, ruff, mypy and the import contracts (part of the tests)
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: build  ## config/matcher.yaml and docs/parameters.md, from the declaration of the parameters
	tools/with_ros python tools/generate_docs.py

demo-bag: build  ## the bag that ships with the package, from the simulation
	tools/with_ros python -m simulation.bags kpmatch_ros/data/demo

help:  ## what each target does
	@sed -nE 's/^([a-z][a-z0-9-]*):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

clean:  ## everything that was built, the environment too
	rm -rf .venv .venv-* build build-* install install-* log demo

# Not compiled by pip: Python compiles what is imported, a tenth of all modules, and keeps that.
$(VENV)/.ready: $(REQUIREMENTS) tools/check_prerequisites tools/fix_ros_wheels.py
	PYTHON=$(PYTHON) tools/check_prerequisites
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/python tools/fix_ros_wheels.py
	touch $@

$(MESSAGES): $(VENV)/.ready $(SOURCES)
	rm -rf $(STAGE) && mkdir -p $(STAGE) && cp -a $(PARTS) $(STAGE)/
	tools/with_ros colcon --log-base $(BUILD)/log build --base-paths $(BUILD)/source --build-base $(BUILD) --install-base $(INSTALL) \
	  --event-handlers console_cohesion- --cmake-args -DBUILD_TESTING=OFF
	touch $@
