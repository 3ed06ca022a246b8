# Two commands do everything: `make demo` runs the real job, `make test` passes all tests.
SHELL := /bin/bash
MODEL := smollm2-135m-instruct
CACHE ?= $(HOME)/.cache/tandem
MODEL_DIR := $(CACHE)/models/$(MODEL)
TANDEM := target/release/tandem

.PHONY: demo test faults test-rdma clients chart observability images soak hostile sabotage fuzz deny setup build model lint fmt

demo: build model ## a question through a disaggregated cluster, answered on the terminal
	@echo
	@echo '$$ tandem generate --strategy disaggregated "What is the capital of France?"'
	@$(TANDEM) generate --cache-dir $(CACHE) --strategy disaggregated "What is the capital of France?"

test: setup model chart observability images clients ## everything: unit, property, model-golden and whole-cluster tests, chart, alarms, images
	TANDEM_TEST_MODEL=$(MODEL_DIR) cargo nextest run --workspace
	cargo test --doc --workspace -q
	@$(MAKE) --no-print-directory sabotage
	@$(MAKE) --no-print-directory faults TIMES=1

TIMES ?= 20
faults: model ## kill -9 of each process kind at each event of a request's life, and of one of two routers, TIMES=20 each; SEED=N repeats one
	cargo build -q --bin tandem
	python3 tests/faults/kills.py --tandem target/debug/tandem --model $(MODEL_DIR) --times $(TIMES) $(if $(SEED),--seed $(SEED))
	python3 tests/faults/routers.py --tandem target/debug/tandem --model $(MODEL_DIR) --times $(TIMES)

chart: build ## the Helm chart: lint, Kubernetes' schemas over values files and features, refusals, the binary's flags
	@python3 deploy/test/chart.py "$$(deploy/test/tools.sh)" $(TANDEM)

observability: model ## alarms with their unit tests, the dashboard, real metrics pages: promtool, and every name against the documents
	@python3 deploy/test/observability.py "$$(deploy/test/tools.sh)" $(TANDEM) $(MODEL_DIR)

images: model ## Dockerfile and compose.yaml: hadolint, the compose specification, flags, the health check
	@python3 deploy/test/images.py "$$(deploy/test/tools.sh)" $(TANDEM) $(MODEL_DIR)

CLIENTS ?= openai page rotel
clients: model ## OpenAI's client, a browser on the status page, an OpenTelemetry collector; CLIENTS='grpcurl aiperf guidellm' for the others
	@tests/clients/run.sh $(TANDEM) $(CACHE) $(CLIENTS)

MINUTES ?= 5
soak: build model ## processes, etcd and load for MINUTES=5 with a random fault every few seconds; SEED=N repeats one
	python3 tests/faults/soak.py --tandem $(TANDEM) --model $(MODEL_DIR) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

SCALE ?= 1
hostile: build model ## slow, huge, endless, forged and replayed requests against a router, SCALE=1 (10,000 open streams and so on)
	python3 tests/faults/hostile.py --tandem $(TANDEM) --model $(MODEL_DIR) --scale $(SCALE)

RUNS ?= 1000000
fuzz: setup ## every parser of outside bytes, RUNS=1000000 inputs each; hours for all; installs a nightly Rust and cargo-fuzz
	rustup toolchain install nightly --profile minimal
	cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked
	python3 fuzz/seeds.py
	cd fuzz && cargo +nightly fuzz build
	python3 fuzz/campaign.py --runs $(RUNS) $(TARGETS)

test-rdma: ## KV over real verbs: builds a small kernel with soft-RoCE once (10 minutes), then tests inside it
	@tools/rdma/test.sh

sabotage: setup ## builds with one protection off at a time, each of which the model check must catch
	tools/sabotage.sh

setup: ## what builds and tests need from the system
	@tools/setup.sh

build: setup
	cargo build --release --bin tandem

model: build
	@$(TANDEM) model fetch --cache-dir $(CACHE) $(MODEL)

deny: ## licences, sources and banned crates of the dependencies, and known weaknesses where their database can be fetched
	@tools/deny.sh

lint: setup ## formatting and lints, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt:
	cargo fmt --all
