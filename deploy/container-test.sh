#!/usr/bin/env bash
# Follows FOLDER/commands with the image FOLDER/*.oci.tar: deploy/container-test.sh FOLDER. It does so in namespaces of its own, as
# one machine with Podman, and a registry (the program FOLDER/registry) and an upstream (FOLDER/coredns) on it.
set -euo pipefail

if [ "${2:-}" != inside ]; then
    exec unshare --mount --net --pid --fork --kill-child --mount-proc "$0" "$1" inside
fi
cd "$1"

fail() { echo "FAIL: $*"; tail -n 5 *.log; podman logs dns || true; exit 1; }
step() { echo "== $*"; }

# What Podman, its network and its user write elsewhere.
for dir in /run /var/lib/cni /var/tmp; do
    [ ! -d $dir ] || mount -t tmpfs -o mode="$(stat -c %a $dir)" tmpfs $dir
done
# Where control groups of both versions are mounted, crun wants none of version 2.
! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
ip link set lo up
ip netns add upstream
ip link add upstream0 type veth peer name upstream1 netns upstream
ip addr add 198.51.100.1/24 dev upstream0
ip link set upstream0 up
ip -n upstream addr add 198.51.100.53/24 dev upstream1
ip -n upstream link set upstream1 up
ip -n upstream link set lo up
ip route add default via 198.51.100.53
ip -n upstream route add default via 198.51.100.1
echo 1 >/proc/sys/net/ipv4/ip_forward
echo "127.0.0.1 localhost registry.example.org" >hosts
echo "nameserver 198.51.100.53" >resolv.conf
for file in hosts resolv.conf; do
    target=$(realpath -m /etc/$file) # it may be a link into /run
    [ -e "$target" ] || { mkdir -p "$(dirname "$target")" && : >"$target"; }
    mount --bind $file "$target"
done
config=$PWD/home/.config/containers
mkdir -p "$config"
export TMPDIR=$PWD HOME=$PWD/home CONTAINERS_CONF=$config/containers.conf CONTAINERS_STORAGE_CONF=$config/storage.conf
# Limits are those that this user may set: root may have no right to more.
cat >"$config/containers.conf" <<END
[containers]
default_ulimits = ["nofile=$(ulimit -Sn):$(ulimit -Hn)", "nproc=$(ulimit -Su):$(ulimit -Hu)"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
END
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/storage"\nrunroot = "/run/storage"\n' "$PWD" >"$config/storage.conf"
printf '[[registry]]\nlocation = "registry.example.org"\ninsecure = true\n' >"$config/registries.conf"
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$config/policy.json"

cat >upstream <<'END'
.:53 {
    bind 198.51.100.53
    template IN A example.org {
        answer "{{ .Name }} 300 IN A 192.0.2.1"
    }
}
END
ip netns exec upstream ./coredns -conf upstream >upstream.log 2>&1 &
upstream=$!
./registry -port 80 >registry.log 2>&1 &
n=0
until dig +short +tries=1 +time=1 @198.51.100.53 www.example.org >/dev/null && curl -sf http://registry.example.org/v2/ >/dev/null; do
    n=$((n + 1))
    [ $n -lt 300 ] || fail "no upstream, or no registry"
    sleep 0.1
done

# answers wants what the upstream says, by UDP and by TCP.
answers() {
    local transport n answer
    for transport in +notcp +tcp; do
        n=0
        until answer=$(dig +short +tries=1 +time=2 $transport @127.0.0.1 www.example.org A) && [ "$answer" = 192.0.2.1 ]; do
            n=$((n + 1))
            [ $n -lt 100 ] || fail "the answer is '$answer'"
            sleep 0.1
        done
    done
}

# Word for word. What a command starts answers before the next one.
follow() {
    local line=$1 out
    step "$line"
    out=$(eval "$line" 2>&1 </dev/null) || fail "$line: $out"
    printf '%s\n' "$out"
    case $line in
    "podman run "* | "podman restart "*) answers ;;
    "podman load "*) grep -q "^Loaded image.*localhost/coredns-optcache:$(cat version)$" <<<"$out" || fail "another name" ;;
    "dig "*) grep -q '192\.0\.2\.1$' <<<"$out" || fail "no answer" ;;
    *" optcachectl status") grep -q '^  requests ' <<<"$out" || fail "no status" ;;
    esac
}

while read -r line; do
    case $line in
    "podman run "*) run=$line ;;
    "podman restart "*)
        kill $upstream # so that every answer is one that was kept
        wait $upstream || true
        ;;
    "podman volume rm "*)
        follow "$run" # the version after the upgrade, with the volume
        follow "podman stop dns"
        follow "podman rm dns"
        ;;
    esac
    follow "$line"
done <commands
[ -z "$(podman ps --all --quiet; podman volume ls --quiet)" ] || fail "something is left: $(podman ps --all; podman volume ls)"
step passed
