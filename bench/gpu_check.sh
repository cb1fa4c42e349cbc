#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: are the kernels right, and how fast are they? One call, under 9 minutes.
#
#   bash bench/gpu_check.sh DIR           tests, core speed suite, LSTM training, soak, tuning sweep
#   bash bench/gpu_check.sh --full DIR    the whole grid, as many parts as fit; call it again for those DIR does not hold
#
# DIR gets 8 files at most; summary.txt is the one to read first. A part that fails does not keep the others from
# running; the exit status is 0 if all passed, 1 if one failed, 2 if nothing could run, 3 if parts of the grid are left.
# PYTHON names the interpreter (python3), GPU_CHECK_SECONDS the time for all (530).
set -u

usage="usage: bash bench/gpu_check.sh [--full] DIR"
if [ "${1-}" = --help ]; then
    echo "$usage"
    exit 0
fi
full=no
if [ "${1-}" = --full ]; then
    full=yes
    shift
fi
if [ $# -ne 1 ] || [ -z "$1" ] || [ "${1#-}" != "$1" ]; then
    echo "$usage" >&2
    exit 2
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: $python has no torch that finds an NVIDIA GPU, so there is nothing to check here" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
dir=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
limit=${GPU_CHECK_SECONDS:-530}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

failed=0
say() { echo "$*" | tee -a "$dir/summary.txt"; }
left() { echo $((limit - SECONDS)); }

# part NAME SECONDS LOG COMMAND...: run it for that long at most. An interrupt lets pytest write what it has.
part() {
    local name=$1 seconds=$2 log=$3 begin=$SECONDS status=0
    shift 3
    if [ "$seconds" -lt 15 ]; then
        say "$name: FAILED, no time left for it"
        failed=1
        return
    fi
    timeout --signal=INT --kill-after=10 "$seconds" "$@" </dev/null >>"$dir/$log" 2>&1 || status=$?
    case $status in
        0) say "$name: passed in $((SECONDS - begin)) s" ;;
        124 | 137) say "$name: FAILED, stopped after $((SECONDS - begin)) s; see $log" ;;
        *) say "$name: FAILED with status $status after $((SECONDS - begin)) s; see $log" ;;
    esac
    say "    $(tail -n 1 "$dir/$log")"
    if [ $status -ne 0 ]; then failed=1; fi
}

# A warning of another torch or Triton than the project's own is shown, and fails nothing.
pytest=("$python" -m pytest -q -W default -p no:cacheprovider --continue-on-collection-errors)

if [ $full = yes ]; then
    rm -f "$dir/summary.txt" "$dir/grid.log"
    "$python" -m bench.gpu.grid "$dir" --seconds $((limit - 20)) </dev/null >"$dir/grid.log" 2>&1
    status=$?
    grep -E '^(H[0-9]+_|bench\.gpu\.grid)' "$dir/grid.log" | while read -r line; do say "$line"; done
    if [ -e "$dir/grid.json" ]; then
        "$python" -m bench.report "$dir/grid.json" --gpu >"$dir/grid.md" 2>>"$dir/grid.log" || status=1
        say "$("$python" -m bench.report "$dir/grid.json" --gpu-goals 2>&1)"
    fi
    if [ $status -eq 3 ]; then say "some parts are left: call it again"; fi
    exit $status
fi

rm -f "$dir"/{summary.txt,tests.log,core.json,core.md,training.json,sweep.jsonl,soak.jsonl,other.log}
(nvidia-smi && "$python" -c 'from triton_sparse_rnn.doctor import diagnosis; print(diagnosis())') >>"$dir/other.log" 2>&1

several=()
if "$python" -c 'import xdist' 2>/dev/null; then several=(-n 8); fi
# Tests of kernels run natively here, all but those that show in processes of the CPU how programs work side by side.
# Others are chosen by their marker, and only their files are collected: the rest may import what is not here.
part "tests of kernels" 150 tests.log "${pytest[@]}" "${several[@]}" -m 'gpu or not slow' \
    --ignore-glob='*_processes.py' tests/kernels/triton
mapfile -t others < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/triton/')
if [ ${#others[@]} -gt 0 ]; then
    part "other tests on a GPU" 60 tests.log "${pytest[@]}" "${several[@]}" -m gpu "${others[@]}"
fi

part "compilation" 75 other.log "$python" -m bench.gpu.warm
benchmark=(--benchmark-max-time=0.1 --benchmark-min-rounds=5 --benchmark-disable-gc --benchmark-columns=median,iqr,rounds)
time_for_core=$(($(left) - 205)) # training, soak and sweep have the rest
part "core suite" "$time_for_core" other.log "${pytest[@]}" -rs -m gpu bench/gpu/bench_core.py \
    --stop-after=$((time_for_core - 15)) "${benchmark[@]}" --benchmark-json="$dir/core.json"
part "LSTM training" 70 other.log "${pytest[@]}" -rs -m gpu bench/gpu/bench_lstm_training.py --stop-after=55 \
    "${benchmark[@]}" --benchmark-json="$dir/training.json"
part "soak" 60 other.log "$python" -m bench.gpu.soak --out "$dir/soak.jsonl"
part "sweep" $(($(left) - 15)) other.log "$python" -m bench.gpu.sweep --out "$dir/sweep.jsonl" --seconds $(($(left) - 30))

if [ -s "$dir/core.json" ]; then
    "$python" -m bench.report "$dir/core.json" --gpu >"$dir/core.md" 2>>"$dir/other.log" || failed=1
    say "$("$python" -m bench.report "$dir/core.json" --gpu-goals 2>&1)"
fi
if [ -s "$dir/training.json" ]; then
    say "$("$python" -m bench.gpu.bench_lstm_training "$dir/training.json" 2>&1)"
fi
tail -n 40 "$dir/other.log"
exit $failed
