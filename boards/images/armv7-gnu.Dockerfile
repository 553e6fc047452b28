# Image for `cross build --target armv7-unknown-linux-gnueabihf`: 32-bit boards with glibc 2.31 and newer.
FROM debian:bullseye-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
      ca-certificates gcc libc6-dev make gcc-arm-linux-gnueabihf libc6-dev-armhf-cross \
    && rm -rf /var/lib/apt/lists/*
ENV CARGO_TARGET_ARMV7_UNKNOWN_LINUX_GNUEABIHF_LINKER=arm-linux-gnueabihf-gcc \
    CC_armv7_unknown_linux_gnueabihf=arm-linux-gnueabihf-gcc
