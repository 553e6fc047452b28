# Makes an uploaded release the current one, or leaves everything as it was. Runs on the board, as root where the service is
# to be one of the system, and to its end even when the link breaks.
# Arguments: home of the service, its name, the release, systemd or none, most milliseconds or -, seconds to watch.
# Exit status: 0 done, 10 not the files that were packed, 11 self-test, 12 service does not stay up.
home=$1 name=$2 release=$3 manager=$4 most=$5 settle=$6
trap '' HUP PIPE
exec >"$home/deploy.log" 2>&1 </dev/null
incoming=$home/incoming/$release new=$home/releases/$release
old=$(readlink "$home/current" 2>/dev/null)
service() { [ "$manager" = none ] || systemctl "$@"; }
running() { [ "$manager" != none ] && systemctl is-active --quiet "$name.service"; }
point() {
  ln -sfn "$2" "$home/.$1.new" && mv -Tf "$home/.$1.new" "$home/$1"
}

if [ -d "$incoming" ]; then
  # The program in use verifies what is new: it is the one that this board trusts.
  verifier=$incoming/vedge-run
  [ -n "$old" ] && [ -x "$home/current/vedge-run" ] && verifier=$home/current/vedge-run
  if ! "$verifier" verify "$incoming"; then
    rm -rf "$incoming"
    exit 10
  fi
  [ "releases/$release" = "$old" ] || rm -rf "$new"
  mkdir -p "$home/releases"
  if [ -d "$new" ]; then rm -rf "$incoming"; else mv "$incoming" "$new"; fi
  [ "$(id -u)" = 0 ] && chown -R 0:0 "$new"
  chmod 755 "$new"
fi
[ -e "$home/vedge.conf" ] || cp "$new/vedge.conf" "$home/vedge.conf"

was=no
if running; then
  was=yes
  service stop "$name.service"
fi
limit=
[ "$most" = - ] || limit="--max-ms $most"
if ! "$new/vedge-run" doctor "$new/model.onnx" $limit; then
  [ "$was" = yes ] && service start "$name.service"
  [ "releases/$release" = "$old" ] || rm -rf "$new"
  exit 11
fi

[ -e "$home/$name.service" ] && cp "$home/$name.service" "$home/.$name.service.old"
mv -f "$home/incoming/$name.service" "$home/$name.service"
point current "releases/$release"
if [ "$manager" = systemd ]; then
  systemctl link "$home/$name.service" >/dev/null 2>&1
  systemctl daemon-reload
  systemctl enable "$name.service" >/dev/null 2>&1
  systemctl restart "$name.service"
  begun=$(systemctl show -p NRestarts "$name.service")
  sleep "$settle"
  if ! running || [ "$(systemctl show -p NRestarts "$name.service")" != "$begun" ]; then
    systemctl status --no-pager --lines=5 "$name.service" 2>&1
    if [ -n "$old" ] && [ "releases/$release" != "$old" ]; then
      point current "$old"
      [ -e "$home/.$name.service.old" ] && mv -f "$home/.$name.service.old" "$home/$name.service"
      systemctl daemon-reload
      systemctl restart "$name.service"
      rm -rf "$new"
    else
      systemctl stop "$name.service"
    fi
    exit 12
  fi
fi
rm -f "$home/.$name.service.old"
if [ -n "$old" ] && [ "$old" != "releases/$release" ]; then
  point previous "$old"
fi
# The current and the previous release stay.
for folder in "$home"/releases/*; do
  case releases/$(basename "$folder") in
    "$(readlink "$home/current")" | "$(readlink "$home/previous" 2>/dev/null)") ;;
    *) rm -rf "$folder" ;;
  esac
done
rm -rf "$home/incoming"
exit 0
