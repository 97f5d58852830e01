#!/bin/sh
# Builds the image IMAGE from bin/coredns and this machine's CA certificates: deploy/image.sh IMAGE.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # Debian has setcap there

for tool in buildah setcap; do
    command -v "$tool" >/dev/null || {
        echo "$tool is missing: apt-get install buildah libcap2-bin, and uidmap to build without root" >&2
        exit 1
    }
done

# Only root may set a file capability; of a user namespace is enough.
[ "$(id -u)" = 0 ] || exec buildah unshare deploy/image.sh "$@"

context=bin/image
rm -rf $context
mkdir -p $context
cp bin/coredns $context/coredns
cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" $context/ca-certificates.crt
chmod 755 $context/coredns
chmod 644 $context/ca-certificates.crt
setcap cap_net_bind_service=ep $context/coredns
buildah build ${GOARCH:+--arch "$GOARCH"} --file deploy/Dockerfile --tag "$1" $context
