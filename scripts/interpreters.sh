#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# usage: interpreters.sh [VERSION...]        default: every supported version
#
# Prints "X.Y PATH" for each CPython with C headers that is found: pyenv's first, then pythonX.Y on
# PATH, then those under $PROFLINK_CACHE. X.Yt is a free-threaded one. What is missing is said on
# stderr.
set -euo pipefail

[ $# -gt 0 ] || set -- 3.11 3.12 3.13 3.14 3.15 3.13t 3.14t
cache=${PROFLINK_CACHE:-.cache}
pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}

# A pyenv shim of a version that is not switched on exists, and fails: so each is asked.
usable() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import os, sys, sysconfig
free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
ok = (
    sys.implementation.name == "cpython"
    and "%d.%d%s" % (*sys.version_info[:2], free_threaded) == sys.argv[1]
    and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
)
sys.exit(not ok)
PYTHON
}

for version; do
    found=
    while read -r candidate; do
        if [ -n "$candidate" ] && usable "$candidate" "$version"; then
            found=$candidate
            break
        fi
    done < <(
        printf '%s\n' "$pyenv_root/versions/${version%t}".*/bin/"python$version" | sort --version-sort -r
        command -v "python$version" || true
        echo "$cache/interpreters/py$version/bin/python$version"
    )
    if [ -n "$found" ]; then
        echo "$version $found"
    else
        echo "interpreters.sh: no CPython $version" >&2
    fi
done
