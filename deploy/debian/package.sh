#!/bin/sh
# Makes a Debian package of what a release has for one platform: deploy/debian/package.sh VERSION GOARCH FOLDER OUT.
set -eu
cd "$(dirname "$0")/../.."

# A release whose modules can all be fetched; those of some later ones cannot.
NFPM=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.1

arch=$2
[ "$arch" != arm ] || arch=arm7 # armhf
VERSION=$1 ARCH=$arch STAGE=$3 GOOS= GOARCH= ${GO:-go} run $NFPM package --packager deb --config deploy/debian/nfpm.yaml --target "$4"
