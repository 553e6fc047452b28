# Image for `cross build --target aarch64-unknown-linux-gnu`: Debian 11 (glibc 2.31: Bullseye, JetPack 5 and newer), binutils
# 2.35, which know dot products (the stock image's do not: its programs then lack those kernels).
FROM debian:bullseye-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
      ca-certificates gcc libc6-dev make gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
    && rm -rf /var/lib/apt/lists/*
ENV CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
