# syntax=docker/dockerfile:1
# Two images. The first was built with buildah 1.28 (chroot isolation) and run as its user: chat, serve, SIGTERM; its two
# base images were stood in for by Debian bookworm and Rust 1.95, since no registry of images was at hand. The second was
# not built. Both are clean before hadolint:
#
#   docker build --target cpu -t radapt:0.1.0 .
#   docker build --target cuda --build-arg CUDA_COMPUTE_CAP=90 -t radapt:0.1.0-cuda .
#
# Run with nothing the process does not need, models from outside:
#
#   docker run --read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges --pids-limit 256 \
#       --memory 32g -v /models:/models:ro -p 127.0.0.1:8080:8080 radapt:0.1.0 \
#       serve --addr 0.0.0.0:8080 --model /models/llava-1.5-7b-hf --keys /models/keys.toml
#   docker run --gpus all ... radapt:0.1.0-cuda serve --device cuda:0 ...
#
# Behind a proxy that speaks TLS (docs/serving.md). examples/k8s uses the same images. Pin the three base images by
# digest (FROM name:tag@sha256:...) for builds that are to be the same tomorrow.
ARG DEBIAN=bookworm
ARG CUDA=12.8.1

FROM docker.io/library/rust:1.89-${DEBIAN} AS build
WORKDIR /src
COPY . .
# .dockerignore keeps everything out that git ignores; the build needs the crates registry.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && install -m 755 target/release/radapt /radapt

# candle's and mistral.rs' kernels are compiled by nvcc for one compute capability: 80 A100, 89 RTX 4090, 90 H100 and H200.
FROM docker.io/nvidia/cuda:${CUDA}-devel-ubuntu22.04 AS build-cuda
ARG CUDA_COMPUTE_CAP=80
ARG FEATURES=cuda
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP} \
    CARGO_HOME=/usr/local/cargo \
    RUSTUP_HOME=/usr/local/rustup \
    PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:/usr/bin:/bin
# The toolchain of the first stage, so that no installer is fetched and run.
COPY --from=build /usr/local/cargo/bin /usr/local/cargo/bin
COPY --from=build /usr/local/rustup /usr/local/rustup
# Versions are the base image's distribution's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential ca-certificates git pkg-config \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --features "${FEATURES}" && install -m 755 target/release/radapt /radapt

FROM docker.io/nvidia/cuda:${CUDA}-runtime-ubuntu22.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /radapt /usr/local/bin/radapt
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/radapt/
# The built-in models are unpacked there, models of the Hub are looked for in /models/hub; it reaches no network unless
# HF_HUB_OFFLINE is set to 0.
ENV XDG_CACHE_HOME=/tmp HF_HOME=/models/hub HF_HUB_OFFLINE=1
USER 65534:65534
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/radapt"]
CMD ["serve", "--addr", "0.0.0.0:8080"]

FROM docker.io/library/debian:${DEBIAN}-slim AS cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build /radapt /usr/local/bin/radapt
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/radapt/
ENV XDG_CACHE_HOME=/tmp HF_HOME=/models/hub HF_HUB_OFFLINE=1
USER 65534:65534
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/radapt"]
CMD ["serve", "--addr", "0.0.0.0:8080"]
