# What a board says of itself, one `key=value` a line. Arguments: folder of installations, name of the service.
root=$1 name=$2
echo "machine=$(uname -m)"
[ -r /proc/device-tree/model ] && echo "model=$(tr -d '\0' </proc/device-tree/model)"
[ -r /proc/device-tree/compatible ] && tr '\0' '\n' </proc/device-tree/compatible | sed -n 's/^..*$/compatible=&/p'
sed -n '/^processor/s/^/cpuinfo=/p; /^Features/s/^/cpuinfo=/p' /proc/cpuinfo
sed -n '/^MemTotal/s/^/meminfo=/p' /proc/meminfo
echo "uid=$(id -u)"
[ "$(id -u)" = 0 ] || { sudo -n true 2>/dev/null && echo "have=sudo"; }
for command in systemctl rsync; do
  command -v $command >/dev/null 2>&1 && echo "have=$command"
done
[ -d /run/systemd/system ] && echo "have=systemd"
grep -q '^video:' /etc/group && echo "have=video"
place=$root
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
echo "free_kib=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')"
[ -L "$root/$name/current" ] && echo "current=$(basename "$(readlink "$root/$name/current")")"
[ -L "$root/$name/previous" ] && echo "previous=$(basename "$(readlink "$root/$name/previous")")"
for device in /dev/video*; do
  [ -e "$device" ] && echo "camera=$device"
done
echo "probe=done"
