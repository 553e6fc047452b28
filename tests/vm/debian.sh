# Sourced by the scripts beside it: an apt configuration of its own in DIR/apt, for Debian's arm64 packages. The machine's
# package state is not touched.

# use_debian DIR [ARCHITECTURE…]: sets APT_CONFIG and reads the lists; arm64, and those named besides.
use_debian() {
  local apt=$1/apt key=/usr/share/keyrings/debian-archive-keyring.gpg more=
  shift
  [ -e $key ] || { echo "$key is missing; install it with: apt-get install debian-archive-keyring" >&2; exit 1; }
  rm -rf "$apt"
  mkdir -p "$apt/state" "$apt/lists/partial" "$apt/cache/archives/partial"
  : >"$apt/state/status"
  echo "deb [signed-by=$key] ${VEDGE_DEBIAN_MIRROR:-http://deb.debian.org/debian} bookworm main" >"$apt/sources.list"
  [ $# = 0 ] || more=$(printf '"%s"; ' "$@")
  cat >"$apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; $more};
APT::Sandbox::User "";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
Dir::State "$apt/state";
Dir::State::status "$apt/state/status";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
CONF
  export APT_CONFIG=$apt/apt.conf
  apt-get -qq update
}
