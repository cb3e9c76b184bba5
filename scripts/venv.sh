#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# usage: venv.sh PYTHON DIR
#
# Makes a virtual environment with pip, and leaves one alone that already works. What a build needs
# of the machine is checked first: a missing header is a sentence here, and a page of CMake later.
set -euo pipefail

python=$1 venv=$2

die() {
    echo "venv.sh: $*" >&2
    exit 1
}

works() { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

if ! works; then
    command -v "$python" >/dev/null || die "no '$python'; name another with: make PYTHON=python3.12"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version 2>&1) is too old, 3.11 is needed: make PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module (on Debian and Ubuntu: the package python3-venv)"
fi
command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler (on Debian and Ubuntu: the package g++)"

works || "$python" -m venv --clear "$venv"

include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] ||
    die "no Python.h in $include (on Debian and Ubuntu: the package python3-dev)"
