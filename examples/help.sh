#!/usr/bin/env bash
# Sourced by the examples before anything is set up: with --help among the arguments, prints the first lines of the
# script that sources it and ends.
for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
        exit 0
    fi
done
