#!/bin/sh
# Follows FOLDER/commands with the packages there. Then it installs the package FOLDER/a.deb, serves with it as its unit says, upgrades
# to b.deb over a Corefile that was changed, goes back, and removes it: deploy/debian/test.sh FOLDER. From before.deb, the version
# before, it goes to a.deb and back. It does so in namespaces of its own, over a copy of this machine's files that is in memory. Whoever listens at FOLDER/notify writes FOLDER/ready when READY=1 comes.
set -eu

case ${2:-} in
'') exec unshare --mount --net --pid --fork --kill-child "$0" "$1" over ;;
over)
    mkdir -p "$1/over"
    mount -t tmpfs tmpfs "$1/over"
    cd "$1/over"
    mkdir upper work root
    mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
    mount -t proc proc root/proc
    mount --bind /dev root/dev
    mount -t tmpfs tmpfs root/run
    mkdir -p root/shared
    mount --bind "$1" root/shared
    cp "$0" root/shared/test.sh
    ip link set lo up
    exec chroot root /shared/test.sh /shared inside
    ;;
esac

fail() { echo "FAIL: $*"; cat /shared/log; exit 1; }
step() { echo "== $*"; }

unit=/lib/systemd/system/coredns-optcache.service
conf=/etc/coredns-optcache/Corefile
user=61234 # DynamicUser takes one of 61184 to 65519
value() { sed -n "s/^$1=//p" $unit; }

# start does what systemd would, as far as the unit says it.
start() {
    install -d -o $user -g $user -m "$(value StateDirectoryMode)" "/var/lib/$(value StateDirectory)"
    install -d -o $user -g $user -m "$(value RuntimeDirectoryMode)" "/run/$(value RuntimeDirectory)"
    caps=$(value AmbientCapabilities | tr '[:upper:]' '[:lower:]' | sed 's/^cap_/+/')
    rm -f /shared/ready
    began=$(date +%s%3N)
    (
        environment=$(value EnvironmentFile)
        set -a
        . "${environment#-}"
        NOTIFY_SOCKET=/shared/notify exec setpriv --reuid $user --regid $user --clear-groups --no-new-privs \
            --bounding-set "-all,$caps" --inh-caps "-all,$caps" --ambient-caps "-all,$caps" $(value ExecStart)
    ) >/shared/log 2>&1 &
    pid=$!
    n=0
    until [ -e /shared/ready ]; do
        n=$((n + 1))
        [ $n -lt 6000 ] || fail "the service does not say that it is ready"
        kill -0 $pid 2>/dev/null || fail "the service has ended"
        sleep 0.01
    done
    echo "ready after $(($(date +%s%3N) - began)) ms"
}
stop() {
    kill -TERM $pid
    wait $pid || true
}
upstream() {
    cat >/shared/upstream <<'END'
.:5300 {
    bind 127.0.0.1
    template IN A example.org {
        answer "{{ .Name }} 300 IN A 192.0.2.1"
    }
}
END
    /shared/coredns -conf /shared/upstream >/shared/upstream.log 2>&1 &
    upstream=$!
    echo 'OPTCACHE_UPSTREAMS=127.0.0.1:5300' >/etc/default/coredns-optcache
}
answers() {
    n=0
    until answer=$(dig +short +tries=5 +time=5 @127.0.0.1 "$1" A) && [ "$answer" = 192.0.2.1 ]; do
        n=$((n + 1))
        [ $n -lt 20 ] || fail "$1 is '$answer'"
        sleep 0.2 # the snapshot is read in the background
    done
}
is_version() { coredns-optcache -version | grep -F "optcache $1," || fail "$(coredns-optcache -version)"; }
a=$(dpkg-deb -f /shared/a.deb Version | tr '~' -)
b=$(dpkg-deb -f /shared/b.deb Version | tr '~' -)
: >/shared/log

# What docs/install.md says, word for word: systemd is start and stop above.
step document
upstream
sudo() { "$@"; }
systemctl() {
    [ "$*" = "reload coredns-optcache" ] || fail "systemctl $*"
    eval "MAINPID=$pid; $(value ExecReload)"
}
cd /shared
while read -r line; do
    echo "$line"
    case $line in *"dpkg -r "*) stop ;; esac
    eval "$line" || fail "$line"
    case $line in *"dpkg -i "*) start ;; esac
done <commands
[ ! -e /usr/bin/coredns-optcache ] && [ ! -e $conf ] || fail "not removed"

step install
dpkg -i /shared/a.deb
is_version "$a"
grep -qx '# CoreDNS with optcache, for this machine:.*' $conf || fail "no Corefile"
[ -L /etc/systemd/system/multi-user.target.wants/coredns-optcache.service ] || fail "the unit is not enabled"
bash -n /usr/share/bash-completion/completions/optcachectl
for file in man1/optcachectl.1 man7/coredns-optcache.7; do
    dpkg -L coredns-optcache | grep -qx "/usr/share/man/$file" || fail "no $file"
done
if command -v systemd-analyze >/dev/null; then
    # The man pages are left out where dpkg is told so, as in containers.
    ! systemd-analyze verify $unit 2>&1 | grep -v "Command 'man " || fail "the unit is wrong"
fi

step serve
start
answers www.example.org
optcachectl status >/dev/null || fail "optcachectl"
eval "MAINPID=$pid; $(value ExecReload)"
answers www.example.org
stop
[ -s /var/lib/coredns-optcache/snapshot ] || fail "no snapshot"

step upgrade
echo '# mine' >>$conf
dpkg --force-confold -i /shared/b.deb
is_version "$a" # b is the same program in a package of a later version
[ "$(dpkg-query -W -f '${Version}' coredns-optcache | tr '~' -)" = "$b" ] || fail "not upgraded"
tail -n 1 $conf | grep -qx '# mine' || fail "the Corefile is not kept"
grep -q '^# of b' $conf.dpkg-dist || fail "the new Corefile is not beside it"
[ -s /var/lib/coredns-optcache/snapshot ] || fail "the snapshot is gone"
kill $upstream
start
answers www.example.org # from the snapshot
stop

step back
dpkg --force-confold -i /shared/a.deb
tail -n 1 $conf | grep -qx '# mine' || fail "the Corefile is not kept"
start
answers www.example.org
stop

step "upgrade from the version before"
dpkg -P coredns-optcache
upstream
dpkg -i /shared/before.deb
start
answers www.example.org
stop
kill $upstream
echo '# mine' >>$conf
dpkg --force-confold -i /shared/a.deb
is_version "$a"
tail -n 1 $conf | grep -qx '# mine' || fail "the Corefile is not kept"
start
answers www.example.org # from the snapshot of the version before
stop

step "back to the version before"
dpkg --force-confold -i /shared/before.deb
is_version before
tail -n 1 $conf | grep -qx '# mine' || fail "the Corefile is not kept"
start
answers www.example.org # from the snapshot of this version
stop
dpkg --force-confold -i /shared/a.deb

step remove
dpkg -r coredns-optcache
[ ! -e /usr/bin/coredns-optcache ] && [ ! -e $unit ] || fail "not removed"
tail -n 1 $conf | grep -qx '# mine' || fail "the Corefile is not kept"
dpkg -P coredns-optcache
for file in $conf /var/lib/coredns-optcache /etc/systemd/system/multi-user.target.wants/coredns-optcache.service; do
    [ ! -e $file ] && [ ! -L $file ] || fail "$file is still there"
done
step passed
