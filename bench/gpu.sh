#!/usr/bin/env bash
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
