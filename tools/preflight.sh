#!/bin/sh
# One line for each thing that a build needs and this machine lacks, instead of pip's hundred.
missing=0
need() { # what, Debian's package, Fedora's package
    echo "mlpext needs $1: apt install $2 (Debian, Ubuntu) or dnf install $3 (Fedora)" >&2
    missing=1
}
python() { "${PYTHON:-python3}" -c "$1" 2>/dev/null; }

# CXX stays unquoted: it may hold a launcher too, as in "ccache g++".
${CXX:-c++} -std=c++20 -fsyntax-only tools/compiler.cpp 2>/dev/null ||
    need "a C++20 compiler, GCC 11, clang 14 or newer (${CXX:-c++})" g++ gcc-c++
if python 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    python 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        need "Python's headers (Python.h)" python3-dev python3-devel
    python 'import ensurepip, venv' || need "Python's venv module" python3-venv python3-libs
else
    need "Python 3.10 or newer (${PYTHON:-python3})" python3 python3
fi
exit $missing
