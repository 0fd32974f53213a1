# intellect - builds everything. `make help` lists the targets and what was found on this machine.
# Overridable: CC, CXX, NVCC, CFLAGS, LDFLAGS, PREFIX, BUILD, SEEDS.

CC ?= cc
NVCC ?= $(shell command -v nvcc 2>/dev/null)
PREFIX ?= /usr/local
BUILD ?= build
SEEDS ?= 1000
CFLAGS ?= -O2 -g

# Debian 12 names msgpack-c's file `msgpack`, newer releases `msgpack-c`.
MSGPACK := $(shell for p in msgpack-c msgpack; do pkg-config --exists $$p && echo $$p && break; done)
PACKAGES := $(MSGPACK) libsodium libssl libcrypto libevent libevent_openssl libevent_pthreads \
            sqlite3 libcyaml jansson libcurl
PKG_CFLAGS := $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PACKAGES) 2>/dev/null) -ldnnl -lm -lpthread

# -ffp-contract=off: what touches the anchor must not be fused differently by different compilers.
WARN := -Wall -Wextra -Werror -Wshadow -Wpointer-arith -Wwrite-strings -Wstrict-prototypes \
        -Wmissing-prototypes -Wno-missing-field-initializers
ALL_CFLAGS = -std=gnu11 -I. $(WARN) -ffp-contract=off -fno-strict-aliasing -fopenmp $(PKG_CFLAGS) $(CFLAGS)
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
TSAN_TESTS := $(filter %channel %sync %ckpt %core %segment %agent,$(TESTS))

# The simulator compiles the two state machines once more, with the deliberate faults in.
SIM_PURE := $(wildcard coordinator/core*.c node/sync*.c)
SIM_O := $(patsubst %.c,$(BUILD)/faulty/%.o,$(SIM_PURE)) $(call objects,tests/sim)
SIM_LIB_O := $(filter-out $(patsubst %.c,$(BUILD)/%.o,$(SIM_PURE)),$(LIB_O))

.PHONY: all setup help test unit demo lint asan tsan sim bench install clean
.DEFAULT_GOAL := all

all: $(PROGRAMS) ## build both programs
	@$(if $(NVCC),echo "nvcc found: $(NVCC) (the CUDA backend is not part of this build yet)",echo "nvcc not found: CPU build")

$(BUILD)/intellect-node: $(BUILD)/node/main.o $(filter-out $(CORE_O),$(LIB_O))
	$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/intellect-coordinator: $(BUILD)/coordinator/main.o $(CORE_O) $(CKPT_O) $(PROTO_O)
	$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/tests/test_%: $(BUILD)/tests/test_%.o $(LIB_O)
	$(CC) -o $@ $^ $(ALL_LIBS) -lcmocka

$(BUILD)/sim: $(SIM_O) $(SIM_LIB_O)
	$(CC) -o $@ $^ $(ALL_LIBS)

$(BUILD)/faulty/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DSIM_FAULTS -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

clean: ## remove build products
	rm -rf $(BUILD)
