#!/usr/bin/env bash
# The whole course on Colab at the profile `colab`: one T4 with 16 GB, for some hours.
#
# Open a new notebook, choose a GPU under Runtime > Change runtime type, and make this its first
# cell (the two keys under the key symbol on the left: captions and pictures are fetched with them):
#
#   import os
#   from google.colab import drive, userdata
#   drive.mount("/content/drive")
#   for key in ("OPENAI_API_KEY", "KAGGLE_API_TOKEN"):
#       os.environ[key] = userdata.get(key)
#   !curl -fsSL https://raw.githubusercontent.com/tomjerry-real-life/tomjerry-real-life/main/scripts/colab.sh | bash
#
# What it makes lies in your Drive, in MyDrive/tomjerry: `runs`, and `raw` for pictures and films of
# your own (see data/README.md). After a disconnect run the cell again: what is finished is skipped,
# a training goes on from its last checkpoint.
#
# Settings, from the environment: PROFILE (colab), DRIVE (/content/drive/MyDrive/tomjerry), COURSE
# (/content/course, the clone). Arguments go to `tomjerry course`: `| bash -s -- --only 04`.

set -euo pipefail
url=https://github.com/tomjerry-real-life/tomjerry-real-life
course=${COURSE:-/content/course}
drive=${DRIVE:-/content/drive/MyDrive/tomjerry}

if [[ ! -d $(dirname "$drive") ]]; then
  echo "error: no folder $(dirname "$drive"): mount Google Drive first, as this script's head shows" >&2
  exit 2
fi
mkdir -p "$drive/runs" "$drive/raw"
export TOMJERRY_RUNS=$drive/runs

if [[ ! -d $course/.git ]]; then
  git clone --depth 1 "$url" "$course"
fi
# Nothing is pinned or upgraded: Colab keeps what it has, and gets what is missing.
python3 -m pip install -q -e "$course[notebooks]"
if [[ ! -e $course/data/raw ]]; then
  ln -s "$drive/raw" "$course/data/raw"
fi

cd "$course"
exec tomjerry course --profile "${PROFILE:-colab}" "$@"
