#!/usr/bin/env bash
# Sets up the environment with the test extras, then runs the tests: those on one rank, two at a time, beside those with a real Slurm;
# those of how soon runs end; those marked `ranks` under mpirun on 2, 3 and 4 ranks (tests/conftest.py), the matrix of layouts on 6 and 8
# too. The last line is "N passed, N failed"; the names of those that failed come before it.
#   tests/run.sh [--long] [--no-peers] [--ranks "2 3 4"] [--mpi openmpi|mpich|site] [PATH...]
#     --long       the counted proofs too
#     --no-peers   without PyTorch and transformers, so without tests/peers
#     --ranks      other numbers of ranks, without those tests on one; "" leaves them out
#     --mpi        that MPI, in an environment of its own (.venv-NAME)
#     PATH         tests to run (default: all)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit

one="(ranks or not ranks)" long=no peers=--peers ranks="2 3 4" matrix="6 8" venv=.venv mpi=() paths=()
while [ $# -gt 0 ]; do
  case $1 in
    --long) long=yes ;;
    --no-peers) peers= ;;
    --ranks) one="not ranks" ranks=${2?--ranks needs numbers} matrix=; shift ;;
    --mpi) mpi=(--mpi "${2:?--mpi needs a name}"); venv=.venv-$2; shift ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "mpillm: error: tests/run.sh: unknown option $1; see tests/run.sh --help" >&2; exit 2 ;;
    *) paths+=("$1") matrix= ;;
  esac
  shift
done

jobs/setup.sh --test $peers --prefix "$venv" ${mpi[@]+"${mpi[@]}"} || exit
. "$venv/bin/activate"
. jobs/environment.sh
if [ -n "$peers" ] && ! python -c "import torch, transformers" 2>/dev/null; then
  echo "mpillm: error: tests/run.sh: PyTorch and transformers could not be installed, so tests/peers cannot run; --no-peers leaves them out" >&2
  exit 1
fi
color=no
if [ -t 1 ]; then color=yes; fi
export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1
unlong="and not long"
seconds=900            # a launch that takes longer hangs
if [ $long = yes ]; then unlong="" seconds=7200; fi
results=$(mktemp -d) || exit
trap 'rm -rf "$results"' EXIT
passed=0 failed=0 summary=""

# part NAME COMMAND...: one launch; adds its counts. Status 5 of pytest (nothing to run) is no failure.
part() {
  local name=$1 began=$SECONDS code=0 good=0 bad=0 skipped=0
  shift
  printf '\n== %s\n' "$name"
  export MPILLM_TEST_RESULTS=$results/${name// /-}
  timeout --foreground --kill-after=10 $seconds "$@" || code=$?
  if [ -s "$MPILLM_TEST_RESULTS" ]; then read -r good bad skipped < "$MPILLM_TEST_RESULTS"; fi
  [ $code -ne 5 ] || code=0
  [ $code -eq 0 ] || [ "$bad" -gt 0 ] || bad=1     # it crashed, hung or could not collect
  passed=$((passed + good)) failed=$((failed + bad))
  local note=""
  if [ $code -eq 124 ]; then note="  (ended after $seconds s)"; elif [ $code -ne 0 ]; then note="  (exit code $code)"; fi
  summary+=$(printf '%-12s %5d passed %4d failed %4d skipped %6d s%s' "$name" "$good" "$bad" "$skipped" $((SECONDS - began)) "$note")$'\n'
}

if [ ${#paths[@]} -gt 0 ]; then
  part "one rank" python -m pytest -q --color=$color -m "$one $unlong" "${paths[@]}"
else
  # Slurm mostly waits: its tests run beside the first part, and are told after it.
  # Tests of how soon runs end have the machine to themselves.
  alone=(tests/run/test_{doctor,ending,faults,monitor,recovery,signals,storm}.py)
  { MPILLM_TEST_RESULTS=$results/slurm timeout --kill-after=10 $seconds python -m pytest -q -rs --color=no tests/slurm > "$results/slurm.out" 2>&1
    echo $? > "$results/slurm.code"; } &
  beside=$!
  part "one rank" python -m pytest -q --color=$color -n 2 --dist loadfile --no-loadscope-reorder -m "$one $unlong" "${alone[@]/#/--ignore=}" --ignore=tests/slurm
  wait $beside
  part "slurm" bash -c 'cat "$1.out"; exit "$(cat "$1.code")"' tell "$results/slurm"
  part "real runs" python -m pytest -q --color=$color -m "$one $unlong" "${alone[@]}"
fi
for n in $ranks; do
  part "$n ranks" mpirun -n "$n" python -m mpi4py -m pytest -x -q --color=$color -m "ranks $unlong" ${paths[@]+"${paths[@]}"}
done
for n in $matrix; do
  part "$n ranks" mpirun -n "$n" python -m mpi4py -m pytest -x -q --color=$color -m "ranks $unlong" tests/train/test_matrix.py
done

printf '\n%s' "$summary"
for names in "$results"/*.failed; do
  [ ! -e "$names" ] || sed "s|^|failed: $(basename "$names" .failed): |" "$names"
done
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
