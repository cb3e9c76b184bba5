#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# usage: free-threaded.sh [SOURCE]
#
# Builds free-threaded CPython 3.13, of which there are no packages, where interpreters.sh finds it:
# $PROFLINK_CACHE/interpreters/py3.13t. SOURCE: CPython's source tree; default: Debian's source
# package, by way of get-debpy.sh. Some 4 minutes on two idle cores, 270 MB. Wants the -dev packages
# of what CPython's modules use (ssl, ffi, z, bz2, lzma, sqlite3).
set -euo pipefail
cd "$(dirname "$0")/.."

version=3.13
cache=$(realpath -m "${PROFLINK_CACHE:-.cache}")
prefix=$cache/interpreters/py${version}t
get_debpy=${GET_DEBPY:-../shared/tools/get-debpy.sh}
suite=forky # of Debian's suites the one that has this version's sources

die() {
    echo "free-threaded.sh: $*" >&2
    exit 1
}

works() {
    [ -x "$prefix/bin/python${version}t" ] &&
        "$prefix/bin/python${version}t" -c 'import bz2, ctypes, lzma, sqlite3, ssl, venv, zlib'
}

! works 2>/dev/null || exit 0
work=$cache/free-threaded
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT

if [ $# -gt 0 ]; then
    source=$(realpath "$1")
else
    [ -x "$get_debpy" ] || die "needs a source tree, or get-debpy.sh to fetch Debian's"
    "$get_debpy" -k -s "$suite" "$work/debian" "$version"
    (
        cd "$work/debian/apt"
        sed 's/^deb /deb-src /' etc/apt/sources.list >etc/apt/sources.list.d/source.list
        export APT_CONFIG=$PWD/apt.conf
        apt-get update -qq
        cd "$work"
        apt-get -qq source --download-only "python$version"
    ) || die "$suite has no sources of CPython $version"
    mkdir "$work/source"
    tar -C "$work/source" --strip-components=1 -xf "$work"/python"$version"_*.orig.tar.*
    source=$work/source
fi

unset MAKEFLAGS MFLAGS MAKELEVEL # our Makefile's are not for CPython's
mkdir "$work/build"
cd "$work/build"
"$source/configure" -q --disable-gil --disable-test-modules --prefix="$prefix"
make -s -j"$(nproc)"
make -s install
works || die "what was built does not run"
