#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
  systemctl stop @NAME@.service || true
fi
