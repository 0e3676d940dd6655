#!/usr/bin/env bash
# Everything that needs a GPU, tests first, then benchmarks: results as JSON, tables on the screen. Under 9 minutes, no network.
#   jobs/bench/gpu.sh [RESULT_FOLDER] [PART ...]      parts: build tests operations attention step peers llama transports verify commands sanitizer
# PYTHON: the Python to use (default python3), with CuPy, pytest, mpi4py and, for the peers, torch and transformers.
# MPILLM_MPI: folder of a CUDA-aware MPI to use (bin/, lib/), where there is no other.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(build tests operations attention step peers llama transports verify commands sanitizer)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/jobs/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
if [ -n "${MPILLM_MPI:-}" ]; then
  export OPAL_PREFIX=$MPILLM_MPI PATH=$MPILLM_MPI/bin:$PATH LD_LIBRARY_PATH=$MPILLM_MPI/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export MPI4PY_LIBMPI=$MPILLM_MPI/lib/libmpi.so
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

part() {    # name, seconds it may take, command
  [[ " ${parts[*]} " == *" $1 "* ]] || return 0
  local name=$1 limit=$2 started=$SECONDS state
  shift 2
  echo "== $name"
  timeout "$limit" bash -c '"$@"' _ "$@" > "$results/$name.log" 2>&1
  state=$?
  grep -v '^[.s]*  *\[' "$results/$name.log" | tail -n 30 | cut -c1-240
  echo "== $name: exit $state, $((SECONDS - started)) s"
  summary+="$name: exit $state, $((SECONDS - started)) s"$'\n'
}
on_ranks() { local n=$1; shift; mpirun -n "$n" "$python" -m mpi4py "$@"; }
verify() {  # two and four ranks share the GPU
  local layout
  for layout in "2 mesh.dp=2 mesh.zero=1" "2 mesh.tp=2" "2 mesh.pp=2" "2 mesh.cp=2" "4 mesh.dp=2 mesh.tp=2 mesh.zero=3" \
                "2 mesh.dp=2 mesh.zero=1 communication.transport=staged" "4 mesh.pp=2 mesh.tp=2 communication.transport=staged"; do
    set -- $layout
    echo "-- $layout"
    timeout 30 mpirun -n "$1" "$python" -m mpillm verify jobs/quickstart.toml "run.device=${DEVICE:-gpu}" "${@:2}" 2>&1 | grep -v '^-----\|^$' | tail -n 12
    [ "${PIPESTATUS[0]}" = 0 ] || return 1
  done
}
commands() {    # a user's: trained on two ranks, gone on with on one, evaluated and asked for text on the GPU and on the CPU
  local device root=$PWD run="$python -m mpillm"
  mkdir -p "$results/commands" && cd "$results/commands" || return 1
  $run prepare "$root/README.md" text.h5 --tokenizer bytes || return 1
  local job="$root/jobs/quickstart.toml data.train=text.h5 data.validation=text.h5 model.heads=3 model.kv_heads=1 precision.compute=bfloat16"
  job+=" train.batch=8 train.micro_batch=4 train.evaluate_every=30 train.validation_samples=8 run.device=${DEVICE:-gpu}"
  mpirun -n 2 $run train $job train.steps=30 || return 1
  $run train $job train.steps=60 || return 1
  for device in "${DEVICE:-gpu}" cpu; do
    $run evaluate runs/quickstart --data text.h5 --device "$device" && $run generate runs/quickstart --prompt "A rank " --tokens 40 --temperature 0 --device "$device" || return 1
  done
}
sanitizer() {   # both tools at a time
  local tool tests="tests/backend/cuda/test_cuda_norms.py tests/backend/cuda/test_cuda_attention.py tests/backend/cuda/test_cuda_vocabulary.py"
  for tool in memcheck racecheck; do
    timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider -p no:xdist $tests \
      -k "bfloat16 and (few or tile or 37 or cross or decode) and not whole and not two and not shared_memory" > "$results/$tool.txt" 2>&1 &
  done
  wait -n; local first=$?
  wait -n; local second=$?
  tail -n 6 "$results/memcheck.txt" "$results/racecheck.txt"
  return $((first | second))
}
export -f on_ranks verify commands sanitizer
export python results
summary=""
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part build 60 "$python" -m mpillm.backend.build
part tests 120 "$python" -m pytest -q -p no:cacheprovider --color=no tests/backend/cuda --ignore tests/backend/cuda/test_cuda_compile.py --ignore tests/backend/cuda/test_emulator.py
part operations 40 "$python" jobs/bench/gpu_operations.py --out "$results/operations.json"
part attention 50 "$python" jobs/bench/gpu_attention.py --out "$results/attention.json"
part step 60 "$python" jobs/bench/gpu_step.py --out "$results/step.json"
part peers 120 "$python" jobs/bench/gpu_peer.py --model gpt2 --out "$results/peers.json"
part llama 120 "$python" jobs/bench/gpu_peer.py --model llama --rounds 5 --batch 2 --out "$results/llama.json"
part transports 60 on_ranks 2 jobs/bench/gpu_transports.py --out "$results/transports.json"
part verify 120 verify
part commands 90 commands
part sanitizer 120 sanitizer
echo "== summary"
printf '%s' "$summary" | tee "$results/summary.txt"
