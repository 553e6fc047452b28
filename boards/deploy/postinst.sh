#!/bin/sh
set -e
if [ "$1" = configure ]; then
  # A machine of another architecture, or damaged files: said now, not when the service starts.
  @HOME@/vedge-run verify @HOME@
  if [ -x /usr/bin/deb-systemd-helper ]; then
    deb-systemd-helper enable @NAME@.service >/dev/null || true
  fi
  if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload
    systemctl restart @NAME@.service
  fi
fi
