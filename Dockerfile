# One binary, one image: router, prefill and decode workers and the client are its subcommands.
#   docker build -t tandem .                           CPU, about 100 MB
#   docker build --target cuda -t tandem-cuda .        with NVRTC and cuBLASLt for NVIDIA GPUs, about 1.2 GB
#   docker build --target demo -t tandem-demo .        with SmolLM2-135M in it, for trials

FROM rust:1.95-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential libprotobuf-dev protobuf-compiler \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin tandem \
 && strip -o /tandem target/release/tandem

# What runs. libibverbs is looked for when a worker starts, for RDMA. Debian slim, not distroless: old Kubernetes versions run `sleep` in the router's preStop, compose.yaml asks
# /health with bash.
FROM debian:bookworm-slim AS runtime
# Debian's security updates are wanted, so versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates ibverbs-providers libgcc-s1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /tandem /usr/local/bin/tandem
# Nothing is written but the kernel cache and temporary files: the root file system may be read-only.
ENV HOME=/tmp
USER 65532:65532
EXPOSE 50051
ENTRYPOINT ["tandem"]

FROM python:3.12-slim-bookworm AS demo-model
COPY --from=build /tandem /usr/local/bin/tandem
RUN tandem model fetch --cache-dir /cache smollm2-135m-instruct

FROM runtime AS demo
COPY --from=demo-model /cache/models /models
ENV TANDEM_MODEL=/models/smollm2-135m-instruct

# The two libraries that are loaded at run time; the driver's own come with the NVIDIA container runtime.
FROM python:3.12-slim-bookworm AS cuda-libraries
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN pip install --no-cache-dir --no-deps --target /wheels nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 \
 && mkdir /libraries \
 && find /wheels \( -name 'libnvrtc.so.13' -o -name 'libnvrtc-builtins.so.13*' -o -name 'libcublasLt.so.13' \) -exec cp -v {} /libraries/ \; \
 && test -f /libraries/libnvrtc.so.13 && test -f /libraries/libcublasLt.so.13

FROM runtime AS cuda
COPY --from=cuda-libraries /libraries /usr/local/cuda/lib64
ENV LD_LIBRARY_PATH=/usr/local/cuda/lib64 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What `docker build` makes when no target is named.
FROM runtime
