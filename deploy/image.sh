#!/bin/sh
# Builds the image IMAGE from the programs that `make build` makes, and this machine's CA certificates: deploy/image.sh IMAGE.
# With folders like linux_amd64 after it, which have the programs, IMAGE is an index of images for these platforms.
# It reads VERSION and COMMIT, for the labels, and SOURCE_DATE_EPOCH, the time of all files.
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

# build FOLDER OPTION... builds an image of the programs in FOLDER, with options of buildah.
build() {
    context=bin/image
    rm -rf $context
    mkdir -p $context/run $context/cache
    mkdir -m 700 $context/run/optcache $context/cache/optcache
    cp "$1/coredns" "$1/optcachectl" "$1/nodelocal-setup" $context/
    shift
    cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" $context/ca-certificates.crt
    chmod 755 $context/coredns $context/optcachectl $context/nodelocal-setup
    chmod 644 $context/ca-certificates.crt
    setcap cap_net_bind_service=ep $context/coredns
    buildah build ${SOURCE_DATE_EPOCH:+--timestamp "$SOURCE_DATE_EPOCH"} \
        ${VERSION:+--label "org.opencontainers.image.version=$VERSION"} \
        ${COMMIT:+--label "org.opencontainers.image.revision=$COMMIT"} --file deploy/Dockerfile "$@" $context
}

image=$1
shift
if [ $# = 0 ]; then
    build bin ${GOARCH:+--arch "$GOARCH"} --tag "$image"
fi
for folder; do
    platform=${folder##*/}
    build "$folder" --os "${platform%_*}" --arch "${platform#*_}" --manifest "$image"
done
