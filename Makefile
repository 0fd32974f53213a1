# intellect - builds everything. `make help` lists the targets and what was found on this machine.
# Overridable: CC, CXX, NVCC, CFLAGS, LDFLAGS, PREFIX, BUILD, SEEDS.

CC ?= cc
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
PREFIX ?= /usr/local
BUILD ?= build
SEEDS ?= 1000
# V=1 shows whole commands.
Q := $(if $(V),,@)
say = $(if $(V),,@printf '%-5s %s\n' $(1) $@)
CFLAGS ?= -O2 -g

# Debian 12 names msgpack-c's file `msgpack`, newer releases `msgpack-c`.
MSGPACK := $(shell for p in msgpack-c msgpack; do pkg-config --exists $$p && echo $$p && break; done)
PACKAGES := $(MSGPACK) libsodium libssl libcrypto libevent libevent_openssl libevent_pthreads \
            sqlite3 yaml-0.1 jansson libcurl libpcre2-8 libutf8proc zlib libzstd
PKG_CFLAGS := $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PACKAGES) 2>/dev/null) -ldnnl -lm -lpthread

# -ffp-contract=off: what touches the anchor must not be fused differently by different compilers; last, so
# that no CFLAGS undo it.
# -fno-math-errno: sqrtf is then one instruction, and a loop around it is vectorised.
WARN := -Wall -Wextra -Werror -Wshadow -Wpointer-arith -Wwrite-strings -Wstrict-prototypes \
        -Wmissing-prototypes -Wno-missing-field-initializers -Wno-pass-failed
ALL_CFLAGS = -std=gnu11 -I. $(WARN) -fno-math-errno -fno-strict-aliasing -fopenmp $(PKG_CFLAGS) $(CFLAGS) -ffp-contract=off
ALL_LIBS = $(LDFLAGS) -fopenmp $(PKG_LIBS)

objects = $(patsubst %.c,$(BUILD)/%.o,$(wildcard $(1)/*.c))
PROTO_O := $(call objects,proto)
KERNELS_O := $(call objects,kernels)
CKPT_O := $(call objects,ckpt)
CORE_O := $(filter-out %/main.o,$(call objects,coordinator))
NODE_O := $(filter-out %/main.o,$(call objects,node))
LIB_O := $(NODE_O) $(CORE_O) $(CKPT_O) $(KERNELS_O) $(PROTO_O)
PROGRAMS := $(BUILD)/intellect-node $(BUILD)/intellect-coordinator
TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
# Tests and programs that make sense under thread sanitizer: network, sync and checkpoints.
TSAN_TESTS := $(filter %channel %checkpoint %ckpt_write %ckpt_read %ckpt_keep %ckpt_share %carrier %s3 %core %segment %agent,$(TESTS)) $(filter $(BUILD)/tests/test_sync_%,$(TESTS))

# The simulator compiles the two state machines once more, with the deliberate faults in.
SIM_PURE := $(wildcard coordinator/core*.c node/sync*.c)
SIM_O := $(patsubst %.c,$(BUILD)/faulty/%.o,$(SIM_PURE)) $(patsubst %.c,$(BUILD)/faulty/%.o,$(wildcard tests/sim/*.c))
SIM_LIB_O := $(filter-out $(patsubst %.c,$(BUILD)/%.o,$(SIM_PURE)),$(LIB_O))

# A client that breaks the rules, for tests/integration/hostile.sh.
HOSTILE_O := $(call objects,tests/hostile) $(KERNELS_O) $(PROTO_O)
# The S3 store against a real server, for tests/integration/s3.sh.
LIVE_O := $(call objects,tests/s3) $(CKPT_O) $(PROTO_O)
BENCH_O := $(call objects,tests/bench) $(LIB_O)
BENCH_TRAIN_O := $(call objects,tests/bench_train) $(LIB_O)
LAB_O := $(call objects,tests/lab) $(LIB_O)

# The CUDA backend: a plugin, where nvcc is (`make NVCC=` leaves it out); and everywhere the same kernels on an
# emulator, for the tests.
CUDA_SOURCES := $(wildcard kernels/cuda/*.cu)
nvcc_archs := $(if $(NVCC),$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
CUDA_ARCHS ?= $(foreach a,80 89 90 100,$(if $(filter compute_$(a),$(nvcc_archs)),$(a)))
PLUGIN := $(if $(NVCC),$(BUILD)/libintellect-cuda.so)
CUDA_C_O := $(patsubst kernels/cuda/%.c,$(BUILD)/cuda/%.o,$(wildcard kernels/cuda/*.c))
EMULATED_O := $(patsubst %,$(BUILD)/emulator/%.o,$(CUDA_SOURCES) $(wildcard tests/cuda/*.cpp)) \
    $(BUILD)/tests/cuda/staged.o $(CUDA_C_O)
EMULATED_TESTS := $(BUILD)/tests/test_kernels $(BUILD)/tests/test_bf16 $(BUILD)/tests/test_products \
    $(BUILD)/tests/test_outer_cuda $(BUILD)/tests/test_cuda $(BUILD)/tests/test_comm $(BUILD)/tests/test_plan_cuda $(BUILD)/tests/test_shard
# The emulator as a plugin, a management library of no GPU, and an NCCL of none: for tests of what loads them.
EMULATED_PLUGINS := $(BUILD)/emulator/libintellect-cuda.so $(BUILD)/emulator/libnvidia-ml.so.1 $(BUILD)/emulator/libnccl.so.2

# Parsers of outside bytes, each in tests/fuzz/fuzz_NAME.c: libFuzzer programs, and a replayer for any compiler.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_O := $(filter-out %/main.o %/libfuzzer.o,$(call objects,tests/fuzz))

.PHONY: all setup help test unit integration demo lint asan tsan sim churn bench fuzz fuzz-corpus install clean
.DEFAULT_GOAL := all
# Keep the test programs' objects.
.SECONDARY:

# What the programs call themselves: the commit, or the folder that a release was unpacked to.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || basename "$(CURDIR)")

all: $(PROGRAMS) $(PLUGIN) ## build both programs, and the CUDA plugin where nvcc is

help: ## this list, and what was found
	@echo "make TARGET [CC=clang] [CFLAGS=...] [BUILD=dir]"; echo
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo; CC="$(CC)" NVCC="$(NVCC)" PACKAGES="$(PACKAGES)" docker/found.sh

setup: ## install the missing Debian packages (asks sudo unless root)
	@docker/setup-debian.sh

# The recipes re-enter make after `setup`: pkg-config is asked when the Makefile is read.
test: setup ## set up, build, and pass all tests (about 12 minutes on 2 cores)
	@$(MAKE) --no-print-directory -j2 unit-build
	@tests/run.sh $(BUILD) all

demo: setup ## set up, build, and watch four nodes train, one die, one join, the coordinator restart
	@$(MAKE) --no-print-directory -j2 all
	@BUILD=$(BUILD) tests/demo.sh

.PHONY: unit-build
unit-build: $(PROGRAMS) $(PLUGIN) $(EMULATED_PLUGINS) $(TESTS) $(BUILD)/sim $(BUILD)/hostile $(BUILD)/s3_live

unit: unit-build ## unit, twin and reference-vector tests only
	@tests/run.sh $(BUILD) unit

integration: unit-build ## tests with real processes only
	@tests/run.sh $(BUILD) integration

.PHONY: test-reference
test-reference: $(PROGRAMS) $(BUILD)/tests/test_model $(BUILD)/tests/test_kernels $(BUILD)/tests/test_tokenizer ## compare network and tokenizers with the newest PyTorch and transformers of PyPI (0.6 GB)
	@tests/reference/venv.sh $(BUILD)/reference-venv
	@rm -rf $(BUILD)/reference && mkdir -p $(BUILD)/reference
	@$(BUILD)/reference-venv/bin/python tests/reference/make_kernel_vectors.py $(BUILD)/reference/kernel_vectors.bin
	@$(BUILD)/reference-venv/bin/python tests/reference/make_model_vectors.py $(BUILD)/reference --random 40
	@$(BUILD)/reference-venv/bin/python tests/reference/make_tokenizer_vectors.py $(BUILD)/reference --bytes 50000000 --vocabulary 30000
	@REFERENCE=$(BUILD)/reference $(BUILD)/tests/test_tokenizer
	@REFERENCE=$(BUILD)/reference $(BUILD)/tests/test_kernels
	@REFERENCE=$(BUILD)/reference $(BUILD)/tests/test_model
	@BUILD=$(BUILD) tests/reference/published.sh $(BUILD)/reference-venv

.PHONY: test-debian
test-debian: ## make test in a fresh Debian 12, and in a fresh 13 (root and debootstrap; 20 minutes)
	@docker/test-debian.sh bookworm || [ $$? = 77 ]
	@docker/test-debian.sh trixie || [ $$? = 77 ]

.PHONY: test-containers
test-containers: ## build both images with podman, and let the compose file train, lose a node and stop (2 to 4 minutes)
	@docker/setup-debian.sh --containers
	@docker/test-containers.sh || [ $$? = 77 ]

.PHONY: test-s3
test-s3: ## the object store against a real S3 server: installs Ceph, starts it on loopback, tests, stops it (4 minutes)
	@docker/setup-debian.sh --s3
	@$(MAKE) --no-print-directory -j2 all $(BUILD)/s3_live
	@BUILD=$(BUILD) tests/integration/s3.sh
	@BUILD=$(BUILD) tests/s3/moto.sh $(BUILD)/moto-venv || [ $$? = 77 ]
	@BUILD=$(BUILD) STORE=s3 tests/integration/resume.sh
	@BUILD=$(BUILD) MINUTES=1 FAULTS="coordinator member flip skew mixed" tests/s3/faults.sh

churn: all ## 3 minutes of SIGKILL and SIGSTOP on four nodes
	@BUILD=$(BUILD) tests/churn.sh

.PHONY: wan
wan: all $(BUILD)/wan ## five nodes on three continents (emulated links; root): how much of its time each trains, in every mode (12 minutes)
	@BUILD=$(BUILD) tests/wan.sh

sim: $(BUILD)/sim ## simulate SEEDS=1000 runs with faults, then find each deliberate fault
	$(BUILD)/sim --seeds $(SEEDS) --jobs 2
	$(BUILD)/sim --deliberate --seeds 1000 --jobs 2

# What clang-tidy reads; the test programs are left to the compilers.
SOURCES := $(foreach d,proto kernels ckpt coordinator node tests/hostile tests/wan tests/bench tests/bench_train tests/lab tests/fuzz,$(filter-out %/libfuzzer.c,$(wildcard $(d)/*.c)))

lint: ## clang-tidy, cppcheck and a build with clang, warnings are errors
	@$(MAKE) --no-print-directory -j2 CC=clang NVCC= BUILD=$(BUILD)-clang unit-build
	cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr \
	    --suppress=missingIncludeSystem -I. --std=c11 -j2 proto kernels ckpt coordinator node
	@printf '%s\n' $(SOURCES) | xargs -P2 -n4 sh -c 'clang-tidy --quiet "$$@" -- -std=gnu11 -I. -DSIM_FAULTS -fopenmp $(PKG_CFLAGS)' tidy \
	    > $(BUILD)-clang/tidy.log 2>&1; if grep -iE 'warning:|error:' $(BUILD)-clang/tidy.log; then exit 1; fi

SANITIZE := -O1 -g -fno-omit-frame-pointer
asan: ## the CPU tests under address and undefined-behaviour sanitizers
	@$(MAKE) --no-print-directory -j2 NVCC= BUILD=$(BUILD)-asan CFLAGS="$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=all" \
	    LDFLAGS="-fsanitize=address,undefined" unit-build
	@ASAN_OPTIONS=detect_leaks=1 tests/run.sh $(BUILD)-asan unit

tsan: ## network, sync and checkpoint tests under thread sanitizer
	@$(MAKE) --no-print-directory -j2 BUILD=$(BUILD)-tsan CFLAGS="$(SANITIZE) -fsanitize=thread" \
	    LDFLAGS="-fsanitize=thread" $(patsubst $(BUILD)/%,$(BUILD)-tsan/%,$(TSAN_TESTS))
	@OMP_NUM_THREADS=1 tests/run.sh $(BUILD)-tsan unit

FUZZ_MAKE = $(MAKE) --no-print-directory -j2 BUILD=$(BUILD)-fuzz CC=clang LDFLAGS="-fsanitize=address,undefined" \
    CFLAGS="$(SANITIZE) -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all"
fuzz: ## fuzz each parser for FUZZ_SECONDS=60, two at a time (clang)
	@$(FUZZ_MAKE) fuzz-build
	@tests/fuzz/run.sh $(BUILD)-fuzz $(FUZZ_SECONDS) $(FUZZ_TARGETS)

fuzz-corpus: ## renew tests/fuzz/corpus from samples, the corpus itself and what `make fuzz` found
	@$(FUZZ_MAKE) fuzz-build
	@tests/fuzz/corpus.sh $(BUILD)-fuzz $(FUZZ_TARGETS)

.PHONY: fuzz-build
fuzz-build: $(FUZZ_TARGETS:%=$(BUILD)/fuzz_%) $(BUILD)/fuzz

.PHONY: bitexact
bitexact: ## the outer step's bits: gcc, clang, vector widths, x86-64, aarch64 (docker/setup-debian.sh --cross)
	@BUILD=$(BUILD) tests/bitexact/run.sh

bench: all $(BUILD)/bench ## rates beside their floors, as a table and JSON
	@$(BUILD)/bench --json $(BUILD)/bench.json

.PHONY: bench-train
bench-train: $(BUILD)/bench-train ## training steps of 10m, 150m and 4 layers of 1b, fp32 and bf16, beside oneDNN's rate
	@$(BUILD)/bench-train --json $(BUILD)/bench-train.json

.PHONY: bench-torch
bench-torch: $(BUILD)/bench-train ## the same steps in the newest PyTorch of PyPI, in turn with ours (30 minutes)
	@tests/reference/venv.sh $(BUILD)/reference-venv
	@$(BUILD)/reference-venv/bin/python tests/reference/bench_torch.py --json $(BUILD)/bench-torch.json

.PHONY: gpu
gpu: $(PROGRAMS) $(PLUGIN) $(EMULATED_TESTS) $(BUILD)/bench-train ## prove the CUDA backend on this machine's GPU: PART=parity, sanitize, run, bench (each under 8 minutes) or all
	@BUILD=$(BUILD) PART=$(or $(PART),all) tests/gpu.sh

install: all ## install both programs under PREFIX (/usr/local), and the CUDA plugin
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(PROGRAMS) $(DESTDIR)$(PREFIX)/bin
	$(if $(PLUGIN),install -d $(DESTDIR)$(PREFIX)/lib && install -m 755 $(PLUGIN) $(DESTDIR)$(PREFIX)/lib)

# The bundle: each program finds its libraries in ../lib. DT_RPATH, for it holds for libraries' libraries too.
DIST_BIN := $(BUILD)/dist/bin/intellect-node $(BUILD)/dist/bin/intellect-coordinator
DIST_LIBEXEC := $(patsubst %,$(BUILD)/dist/libexec/%,test_kernels test_bf16 test_outer_cuda test_cuda bench-train)
DIST_LINK := -s -Wl,--as-needed,--disable-new-dtags,-rpath,'$$ORIGIN/../lib'
$(BUILD)/dist/bin/intellect-node: $(BUILD)/node/main.o $(filter-out $(CORE_O),$(LIB_O))
$(BUILD)/dist/bin/intellect-coordinator: $(BUILD)/coordinator/main.o $(CORE_O) $(CKPT_O) $(PROTO_O)
$(BUILD)/dist/libexec/test_kernels: $(BUILD)/tests/test_kernels.o $(LIB_O) $(EMULATED_O)
$(BUILD)/dist/libexec/test_bf16: $(BUILD)/tests/test_bf16.o $(LIB_O) $(EMULATED_O)
$(BUILD)/dist/libexec/test_outer_cuda $(BUILD)/dist/libexec/test_cuda: $(BUILD)/dist/libexec/%: $(BUILD)/tests/%.o $(LIB_O) $(EMULATED_O)
$(BUILD)/dist/libexec/bench-train: $(BENCH_TRAIN_O)
$(DIST_BIN) $(DIST_LIBEXEC):
	@mkdir -p $(@D)
	$(call say,LINK)
	$(Q)$(CC) $(DIST_LINK) -o $@ $^ $(ALL_LIBS) $(if $(filter %/bench-train,$@),,$(if $(filter $(DIST_LIBEXEC),$@),-lcmocka -lstdc++))

.PHONY: dist
dist: $(DIST_BIN) $(DIST_LIBEXEC) $(PLUGIN) ## a bundle for any x86-64 Linux: build/intellect-VERSION.tar.gz, checked in another folder
	@docker/dist.sh $(BUILD) $(VERSION)
	@tests/dist.sh $(BUILD)/intellect-$(VERSION).tar.gz

clean: ## remove what was built
	rm -rf $(BUILD) $(BUILD)-asan $(BUILD)-tsan $(BUILD)-clang $(BUILD)-fuzz

# Exact arithmetic is asked for: no flushing of subnormals, true division and roots, as nvcc does by default.
NVCC_FLAGS := -std=c++17 -O3 -I. -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Werror all-warnings
newest_arch := $(lastword $(CUDA_ARCHS))
GENCODE := $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_$(newest_arch),code=compute_$(newest_arch)
$(BUILD)/cuda/outer.o: NVCC_FLAGS += -fmad=false
$(BUILD)/cuda/%.o: kernels/cuda/%.cu $(wildcard kernels/*.h kernels/cuda/*.h) proto/err.h
	@mkdir -p $(@D)
	$(call say,NVCC)
	$(Q)$(NVCC) $(NVCC_FLAGS) -Xptxas -v $(GENCODE) -c -o $@ $< 2>$@.log || { cat $@.log >&2; exit 1; }

$(BUILD)/cuda/err.o: proto/err.c proto/err.h
$(CUDA_C_O): $(BUILD)/cuda/%.o: kernels/cuda/%.c $(wildcard kernels/*.h kernels/cuda/*.h) proto/err.h
$(BUILD)/cuda/err.o $(CUDA_C_O):
	@mkdir -p $(@D)
	$(call say,CC)
	$(Q)$(CC) $(ALL_CFLAGS) -fPIC -fvisibility=hidden -c -o $@ $<

# Its libraries: beside it, or where kernels/plugin.c finds them.
$(BUILD)/libintellect-cuda.so: $(CUDA_SOURCES:kernels/cuda/%.cu=$(BUILD)/cuda/%.o) $(BUILD)/cuda/err.o $(CUDA_C_O)
	$(call say,LINK)
	$(Q)$(NVCC) -shared -cudart static -o $@ $^ -lcublasLt -lz -Xlinker -rpath,'$$ORIGIN'

$(BUILD)/emulator/%.o: % $(wildcard kernels/*.h kernels/cuda/*.h tests/cuda/*.h) proto/err.h
	@mkdir -p $(@D)
	$(call say,CXX)
	$(Q)$(CXX) -std=c++17 -I. -Wall -Wextra -Werror $(CFLAGS) -ffp-contract=off -fPIC -x c++ -c -o $@ $<

$(BUILD)/emulator/libintellect-cuda.so: $(filter-out %/staged.o,$(EMULATED_O)) $(BUILD)/cuda/err.o
	$(call say,LINK)
	$(Q)$(CXX) -shared $(LDFLAGS) -o $@ $^ -lz

$(BUILD)/emulator/libnvidia-ml.so.1: tests/cuda/nvml.c
$(BUILD)/emulator/libnccl.so.2: tests/cuda/nccl.c
$(BUILD)/emulator/libnvidia-ml.so.1 $(BUILD)/emulator/libnccl.so.2:
	@mkdir -p $(@D)
	$(call say,LINK)
	$(Q)$(CC) $(ALL_CFLAGS) -fPIC -shared -Wl,-soname,$(@F) -o $@ $<

$(EMULATED_TESTS): $(EMULATED_O)
$(BUILD)/tests/test_comm $(BUILD)/tests/test_shard: | $(BUILD)/emulator/libnccl.so.2
$(BUILD)/tests/test_sdpa: $(BUILD)/cuda/sdpa.o
$(EMULATED_TESTS): ALL_LIBS += -lstdc++

$(BUILD)/intellect-node: $(BUILD)/node/main.o $(filter-out $(CORE_O),$(LIB_O))
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/intellect-coordinator: $(BUILD)/coordinator/main.o $(CORE_O) $(CKPT_O) $(PROTO_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/tests/test_%: $(BUILD)/tests/test_%.o $(LIB_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS) -lcmocka

$(BUILD)/tests/test_fuzz_corpus: $(FUZZ_O)

$(BUILD)/fuzz: $(BUILD)/tests/fuzz/main.o $(FUZZ_O) $(BUILD)/fuzzed.a
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS) -lcmocka

# Of the archive a target links only what it needs, so that its coverage counts nothing else.
$(BUILD)/fuzzed.a: $(LIB_O)
	$(call say,AR)
	$(Q)rm -f $@; ar rcs $@ $^

FUZZ_SHARED_O := $(filter-out $(BUILD)/tests/fuzz/fuzz_%,$(FUZZ_O))
$(BUILD)/fuzz_%: tests/fuzz/libfuzzer.c $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_SHARED_O) $(BUILD)/fuzzed.a
	$(call say,LINK)
	$(Q)$(CC) $(ALL_CFLAGS) -fsanitize=fuzzer -DFUZZ_TARGET=fuzz_$* -o $@ $^ $(ALL_LIBS) -lcmocka

$(BUILD)/bench: $(BENCH_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/bench-train: $(BENCH_TRAIN_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/outer-lab: $(LAB_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/sim: $(SIM_O) $(SIM_LIB_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/hostile: $(HOSTILE_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/wan: $(BUILD)/tests/wan/wan.o
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^

$(BUILD)/s3_live: $(LIVE_O)
	$(call say,LINK)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS) -lcmocka

$(BUILD)/node/main.o $(BUILD)/coordinator/main.o: ALL_CFLAGS += -DINTELLECT_VERSION='"$(VERSION)"'
$(BUILD)/node/main.o $(BUILD)/coordinator/main.o: $(BUILD)/version
.PHONY: always
$(BUILD)/version: always
	@mkdir -p $(@D); echo '$(VERSION)' | cmp -s - $@ || echo '$(VERSION)' >$@

$(BUILD)/faulty/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC)
	$(Q)$(CC) $(ALL_CFLAGS) -DSIM_FAULTS -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
