#!/usr/bin/env bash
# From a fresh clone to a trained model and text it wrote, on 2 ranks: set-up, token files, training that is stopped
# half-way and goes on on one rank and then on two, validation loss, samples.
#   jobs/quickstart.sh [section.key=value ...]      overrides of jobs/quickstart.toml
# MPILLM_QUICKSTART_RUN names another run than "quickstart".
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
name=${MPILLM_QUICKSTART_RUN:-quickstart}
run=runs/$name

jobs/setup.sh
. .venv/bin/activate
. jobs/environment.sh
set_up=$((SECONDS - began))

say() { printf '\n== %s\n' "$*"; }

if [ -e "$run" ]; then
  echo "$run exists: the quickstart starts a run of its own; move it away, or give a name: MPILLM_QUICKSTART_RUN=quickstart2 $0" >&2
  exit 2
fi

# The last step in metrics.jsonl, 0 before there is one.
step() { { tail -n 1 "$run/metrics.jsonl" 2>/dev/null || true; } | sed -n 's/.*"step": *\([0-9]*\).*/\1/p' | grep . || echo 0; }

# train RANKS [STOP_STEP]: trains; at STOP_STEP asks for a stop as a batch system would (USR1: save and stop, exit code 75).
train() {
  local ranks=$1 stop=${2:-} code=0
  mpirun -n "$ranks" mpillm train jobs/quickstart.toml run.name="$name" ${overrides[@]+"${overrides[@]}"} &
  local job=$!
  if [ -n "$stop" ]; then
    until [ "$(step)" -ge "$stop" ] || ! kill -0 $job 2>/dev/null; do sleep 0.3; done
    kill -USR1 $job 2>/dev/null || true
  fi
  wait $job || code=$?
  [ $code -eq 0 ] || { [ $code -eq 75 ] && [ -n "$stop" ]; } || exit $code
}
overrides=("$@")

if [ ! -e data/stdlib-train.h5 ] || [ ! -e data/stdlib-val.h5 ]; then
  say "prepare: the standard library's text to tokens"
  mpirun -n 2 mpillm prepare stdlib data/stdlib-train.h5 --tokenizer bpe:4096 --validation data/stdlib-val.h5 --share 0.05 --overwrite
fi
say "train on 2 ranks, stopped half-way"
train 2 225
say "resume on 1 rank for a few steps"
train 1 235
say "resume on 2 ranks, to the end"
train 2

say "evaluate"
mpirun -n 2 mpillm evaluate "$run" --data data/stdlib-val.h5 | tee "$run/evaluation.txt"
say "generate"
mpirun -n 2 mpillm generate "$run" --tokens 60 --temperature 0.7 --top-p 0.9 \
  --prompt "def read_file(path):" --prompt "The return value is" --prompt "import os" | tee "$run/samples.txt"

say "made in $((SECONDS - began)) s, of which set-up $set_up s"
cat <<END
token files    data/stdlib-train.h5 data/stdlib-val.h5     mpillm inspect data/stdlib-train.h5
run            $run (job.toml, log.txt, metrics.jsonl, status.json)
checkpoints    $(ls -d "$run"/checkpoints/step-* | tr '\n' ' ')
evaluation     $run/evaluation.txt
samples        $run/samples.txt
END
