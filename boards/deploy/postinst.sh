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
    # A service that does not start, of a wrong setting for example, does not keep the package from being configured.
    systemctl restart @NAME@.service || echo "@NAME@ does not start yet: journalctl -u @NAME@ tells why" >&2
  fi
fi
