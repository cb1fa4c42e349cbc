#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: are the kernels right, and how fast are they? Three checks, the most wanted first.
#
#   bash bench/gpu_check.sh --smoke DIR   in 150 s: a test of each kernel, three GRU layers beside cuDNN
#   bash bench/gpu_check.sh DIR           in 5 minutes (or --core): layers with goals and others, LSTM training
#   bash bench/gpu_check.sh --full DIR    all tests, a soak test, other tiles, the grid: what fits into 9 minutes a call
#
# DIR may be the same for all. What is measured is there at once, in 6 files at most, so a check that is cut leaves it,
# and the same call goes on: what DIR holds is not done again. After a change take another DIR. summary.txt is the file
# to read first; the lines that matter are the last that are printed, too.
#
# Exit status: 0 if all passed, 1 if something failed, 2 if nothing could run, 3 if time ran out: call it again.
# PYTHON names the interpreter (python3), GPU_CHECK_SECONDS the time of a call; a longer one lets its parts
# be longer.
set -u

usage="usage: bash bench/gpu_check.sh [--smoke | --core | --full] DIR"
if [ "${1-}" = --help ]; then
    echo "$usage"
    exit 0
fi
check=core limit=300
case ${1-} in
    --smoke) check=smoke limit=150 && shift ;;
    --core) shift ;;
    --full) check=full limit=530 && shift ;;
esac
usual=$limit limit=${GPU_CHECK_SECONDS:-$limit}
if [ $# -ne 1 ] || [ -z "$1" ] || [ "${1#-}" != "$1" ] || [[ ! $limit =~ ^[0-9]+$ ]]; then
    echo "$usage" >&2
    exit 2
fi
python=${PYTHON:-python3}
project=$(cd "$(dirname "$0")/.." && pwd) || exit 2
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
if ! machine=$("$python" -m bench.gpu.machine 2>&1); then
    echo "$machine" >&2
    echo "gpu_check.sh: $python cannot check a GPU here, as said above" >&2
    exit 2
fi
mkdir -p "$1" && dir=$(cd "$1" && pwd) && cd "$project" || exit 2
rows=$dir/rows.jsonl log=$dir/log.txt summary=$dir/summary.txt
if ! { echo "$machine" && (nvidia-smi 2>&1 || true); } >>"$log"; then
    echo "gpu_check.sh: cannot write to $log" >&2
    exit 2
fi

failed=no left=no
say() { echo "$*" | tee -a "$summary"; }
seconds_left() { echo $((limit - SECONDS)); }
longer() { echo $((limit > usual ? $1 * limit / usual : $1)); }

# part NAME SECONDS COMMAND...: run it, for that long at most, and leave its exit status in `status`. An interrupt lets
# pytest end in order. 75 and 76 are those of bench/record.py.
part() {
    local name=$1 seconds=$2 begin=$SECONDS rest=$(($(seconds_left) - 10)) took
    shift 2
    if [ "$seconds" -gt "$rest" ]; then seconds=$rest; fi
    status=0
    if [ "$seconds" -lt 15 ]; then
        say "$name: left for another call, there is no time"
        left=yes
        return
    fi
    timeout --signal=INT --kill-after=10 "$seconds" "$@" </dev/null >>"$log" 2>&1 || status=$?
    took="after $((SECONDS - begin)) s"
    case $status in
        0) say "$name: passed $took" ;;
        75) left=yes && say "$name: some is left for another call, $took" ;;
        76) failed=yes && say "$name: the GPU has faulted $took" ;;
        124 | 137) left=yes && say "$name: STOPPED $took" ;;
        *) failed=yes && say "$name: FAILED with status $status $took" ;;
    esac
    say "    $(tail -n 1 "$log")"
    case $status in 0 | 75 | 124 | 137) ;; *) tail -n 20 "$log" ;; esac
}

# once NAME SECONDS COMMAND...: a part that is not run again when it has ended, whichever way.
once() {
    case $(grep -E "^$1: (passed|FAILED)" "$summary") in
        *FAILED*) failed=yes && say "$1 has FAILED in an earlier call" ;;
        *passed*) say "$1 has passed in an earlier call" ;;
        *) part "$@" ;;
    esac
}

# suite NAME SECONDS FILE: the rows of a suite that are left; those behind one that crashes, in a new process.
suite() {
    local end=$((SECONDS + $2)) before
    while
        before=$(wc -c "$rows" 2>&1)
        part "$1" $((end - SECONDS)) "${pytest[@]}" -rs -m gpu "$3" --record="$rows" \
            --stop-after=$((end - SECONDS - 15)) --benchmark-max-time=0.1 --benchmark-min-rounds=5 \
            --benchmark-disable-gc --benchmark-columns=median,iqr,rounds
        [ "$(wc -c "$rows" 2>&1)" != "$before" ] && { [ $status = 76 ] || [ $status -gt 137 ] || [ $status = 134 ]; }
    do :; done
}

# A warning of another torch or Triton than the project's own is shown, and fails nothing.
pytest=("$python" -m pytest -q -W default -p no:cacheprovider --continue-on-collection-errors)
several=()
if "$python" -c 'import xdist' >/dev/null 2>&1; then several=(-n 8); fi

say "== $check, $(date -u '+%F %T') UTC: $(tail -n 1 <<<"$machine")"
case $check in
    smoke)
        mapfile -t tests < <(grep -v '^#' bench/gpu/smoke_tests.txt)
        once "a test of each kernel" "$(longer 60)" "${pytest[@]}" "${several[@]}" -m 'gpu or not slow' "${tests[@]}"
        part "compilation" "$(longer 35)" "$python" -m bench.gpu.warm smoke --record "$rows"
        suite "layers" $(($(seconds_left) - 10)) bench/gpu/bench_smoke.py
        ;;
    core)
        part "compilation" "$(longer 70)" "$python" -m bench.gpu.warm core --record "$rows"
        suite "core suite" $(($(seconds_left) - $(longer 75))) bench/gpu/bench_core.py # LSTM training has the rest
        suite "LSTM training" $(($(seconds_left) - 10)) bench/gpu/bench_lstm_training.py
        ;;
    full)
        # Tests of kernels run natively here, all but those that show in processes of the CPU how programs work side by
        # side. Others are chosen by their marker, and only their files are collected: the rest may import what is not
        # here.
        once "tests of kernels" "$(longer 200)" "${pytest[@]}" "${several[@]}" -m 'gpu or not slow' \
            --ignore-glob='*_processes.py' tests/kernels/triton
        mapfile -t others < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/triton/')
        once "other tests on a GPU" "$(longer 60)" "${pytest[@]}" "${several[@]}" -m gpu "${others[@]}"
        once "soak" "$(longer 60)" "$python" -m bench.gpu.soak --out "$dir/soak.jsonl"
        seconds=$(seconds_left)
        seconds=$((seconds - 10 < $(longer 120) ? seconds - 10 : $(longer 120)))
        part "other tiles" "$seconds" "$python" -m bench.gpu.sweep --out "$dir/sweep.jsonl" --seconds $((seconds - 20))
        suite "grid" $(($(seconds_left) - 10)) bench/gpu/bench_grid.py
        ;;
esac

if [ -s "$rows" ]; then
    say "$("$python" -m bench.gpu.headlines "$rows" --table "$dir/table.md" 2>&1)"
fi
if [ $failed = yes ]; then exit 1; fi
if [ $left = yes ]; then
    say "something is left: call it again"
    exit 3
fi
