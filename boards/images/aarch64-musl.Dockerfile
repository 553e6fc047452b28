# Image for `cross build --target aarch64-unknown-linux-musl`: a static program for every 64-bit board. glibc's cross compiler
# assembles; Rust's own musl and linker make it static.
FROM debian:bullseye-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
      ca-certificates gcc libc6-dev make gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
    && rm -rf /var/lib/apt/lists/*
ENV CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld \
    CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc
