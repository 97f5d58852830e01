#!/bin/sh
# Makes the files of a release in bin/release/VERSION: deploy/release.sh VERSION. The Makefile says what it reads of the environment.
# Two builds of one commit give the same bytes, in whatever folder.
set -eu
cd "$(dirname "$0")/.."
umask 022

fail() { echo "release: $*" >&2; exit 1; }

version=$1
printf '%s\n' "$version" | grep -Eqx '[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.]+)?' ||
    fail "VERSION=$version is no version: 1.2.3, or 1.2.3-rc.1"
: "${PLATFORMS:?}" "${GO:=go}" "${COMMIT:=$(git rev-parse HEAD)}" "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct)}"
[ -n "$COMMIT" ] && [ -n "$SOURCE_DATE_EPOCH" ] || fail "COMMIT and SOURCE_DATE_EPOCH are git's, and this is no clone"
export COMMIT SOURCE_DATE_EPOCH

# notes SECTION prints that section of the changelog.
notes() { awk -v h="## [$1]" 'index($0, "## ") == 1 { on = index($0, h) == 1; next } on' CHANGELOG.md; }
# The changelog has no section of its own for what comes before a release.
case $version in *-*) section=Unreleased ;; *) section=$version ;; esac
notes "$section" | grep -q . || fail "CHANGELOG.md has no section [$section]"
[ -z "${SIGNING_KEY:-}" ] || openssl pkey -in "$SIGNING_KEY" -noout || fail "SIGNING_KEY=$SIGNING_KEY is no private key"
if [ "$section" = "$version" ]; then
    changed=$(git status --porcelain --untracked-files=no 2>/dev/null) || true
    [ -z "$changed" ] || fail "these files are not as in $COMMIT:
$changed"
fi

# What else changes a build. Go's own settings of this user, but for where modules come from and go to, are for other work.
for variable in GOPROXY GONOPROXY GOPRIVATE GOSUMDB GONOSUMDB GOINSECURE GOTOOLCHAIN GOCACHE GOMODCACHE; do
    export "$variable=$("$GO" env $variable)"
done
export GOENV=off GOWORK=off GOFLAGS=-buildvcs=false GOFIPS140=off
export CGO_ENABLED=0 GOEXPERIMENT= GOAMD64=v1 GO386=sse2 GOARM=7 GOARM64=v8.0 GORISCV64=rva20u64 LC_ALL=C TZ=UTC

out=bin/release/$version
name=coredns-optcache_$version
rm -rf "$out"
mkdir -p "$out/build"
notes "$section" >"$out/NOTES.md"

# archive FOLDER NAME FILE OPTION... writes NAME in FOLDER as a tar file, the same way each time.
archive() {
    in=$1 what=$2 file=$3
    shift 3
    tar -C "$in" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
        --format=ustar "$@" -cf "$file" "$what"
}

set -- # the programs
for platform in $PLATFORMS; do
    build=$out/build/${platform%/*}_${platform#*/}
    for program in coredns optcachectl; do
        GOOS=${platform%/*} GOARCH=${platform#*/} "$GO" build -trimpath -buildvcs=false -ldflags \
            "-s -w -X main.version=$version -X main.commit=$COMMIT" -o "$build/" ./cmd/$program
        set -- "$@" "$(ls -d "$PWD/$build/$program"*)"
    done
done
# For the image only.
for platform in $PLATFORMS; do
    case $platform in linux/amd64 | linux/arm64) ;; *) continue ;; esac
    image=$out/build/image/${platform%/*}_${platform#*/}
    mkdir -p "$image"
    cp "$out/build/${platform%/*}_${platform#*/}"/* "$image"
    GOOS=${platform%/*} GOARCH=${platform#*/} "$GO" build -C cmd/nodelocal-setup -trimpath -buildvcs=false -ldflags '-s -w' -o "$PWD/$image/" .
    set -- "$@" "$PWD/$image/nodelocal-setup"
done
# What is linked differs by platform. The files name all of it. Its list of modules is one for all platforms.
"$GO" run -C deploy/sbom . -name coredns-optcache -version "$version" -time "$SOURCE_DATE_EPOCH" \
    -spdx "$PWD/$out/$name.spdx.json" -licences "$PWD/$out/${name}_licences.txt" "$@"

# Completion is the same everywhere, so this machine's tool writes it.
host=$out/build/optcachectl
"$GO" build -trimpath -buildvcs=false -o "$host" ./cmd/optcachectl
for platform in $PLATFORMS; do
    folder=${name}_${platform%/*}_${platform#*/}
    stage=$out/build/$folder
    mkdir -p "$stage/completion" "$stage/examples" "$stage/man" "$stage/systemd"
    cp "$out/build/${platform%/*}_${platform#*/}"/* LICENSE README.md CHANGELOG.md "$stage"
    cp "$out/${name}_licences.txt" "$stage/licences.txt"
    cp man/*.[17] "$stage/man"
    cp deploy/debian/Corefile deploy/debian/coredns-optcache.service "$stage/systemd"
    cp examples/Corefile.* "$stage/examples"
    "$host" completion bash >"$stage/completion/optcachectl.bash"
    "$host" completion zsh >"$stage/completion/_optcachectl"
    "$host" completion fish >"$stage/completion/optcachectl.fish"
    chmod -R u=rwX,go=rX "$stage" # whatever the files of the repository have
    archive "$out/build" "$folder" "$out/$folder.tar.gz" -I 'gzip -9n'
    [ "${platform%/*}" != linux ] || deploy/debian/package.sh "$version" "${platform#*/}" "$stage" "$out"
done

# As `helm package` does, which takes the time of day.
chart=$out/build/coredns-optcache
cp -RL deploy/helm/coredns-optcache "$chart"
rm "$chart"/files/*/kustomization.yaml
sed -i -e "s/^version: .*/version: $version/" -e "s/^appVersion: .*/appVersion: \"$version\"/" "$chart/Chart.yaml"
archive "$out/build" coredns-optcache "$out/coredns-optcache-$version.tgz" -I 'gzip -9n'

# An index of images, for the platforms of them that there are. Its digest also depends on buildah's version and on this
# machine's CA certificates.
folders=
for platform in linux/amd64 linux/arm64; do
    case " $PLATFORMS " in *" $platform "*) folders="$folders $out/build/image/${platform%/*}_${platform#*/}" ;; esac
done
if [ -n "$folders" ]; then
    image=localhost/coredns-optcache-release:$$ # another one may run
    buildah manifest rm "$image" >/dev/null 2>&1 || true
    VERSION=$version deploy/image.sh "$image" $folders >/dev/null
    # The name is the image's where `podman load` and the like have loaded it.
    buildah manifest push --all --quiet "$image" "oci:$PWD/$out/build/oci:coredns-optcache:$version"
    buildah manifest rm "$image" >/dev/null
    archive "$out/build/oci" . "$out/$name.oci.tar"
fi

(cd "$out" && find -- * -maxdepth 0 -type f -exec sha256sum -- {} + >build/SHA256SUMS && mv build/SHA256SUMS .)
# As cosign signs a blob with a key of one's own: cosign verify-blob --key KEY.pub --signature SHA256SUMS.sig SHA256SUMS.
if [ -n "${SIGNING_KEY:-}" ]; then
    openssl dgst -sha256 -sign "$SIGNING_KEY" -out "$out/build/signature" "$out/SHA256SUMS"
    base64 -w 0 "$out/build/signature" >"$out/SHA256SUMS.sig"
fi
# What is in the archives and in the image, in bytes.
stat -c '%12s  %n' "$@" | sed "s|$PWD/$out/build/||"
rm -rf "$out/build"
ls -l "$out"
