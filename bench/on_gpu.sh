#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, past failures: bench/on_gpu.sh [--quick] OUTDIR [TEXT]
#   python -m kernels --check; the benchmark suite, and the terms of predicted times that its results give; tests of all
#   kernels on the GPU; compute-sanitizer on a small training run and a small generation; one epoch of the tutorial with
#   and without CUDA graphs, and ten epochs twice, which must give equal bytes. TEXT is the file to train on (default:
#   that of train.py).
#   --quick: the benchmarks of our own kernels at the tutorial's sizes, one sanitizer; not the check, the terms, and the
#   ten epochs.
# The output of each part goes to OUTDIR/PART.log, the results of the benchmarks to OUTDIR/results, to be moved to
# bench/results; a summary is printed last and kept in OUTDIR/summary.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
quick=
if [ "${1-}" = --quick ]; then
    quick=yes
    shift
fi
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh [--quick] OUTDIR [TEXT]}" && cd "$1" && pwd)
text=(${2:+--data "$2"})
: > "$out/summary.txt"

part() {  # part NAME COMMAND...: run a command, keep its output, note how it ended and how long it took
    local name=$1 started=$SECONDS status
    shift
    "$@" > "$out/$name.log" 2>&1
    status=$?
    printf '%-24s exit %3d  %4d s\n' "$name" "$status" $((SECONDS - started)) >> "$out/summary.txt"
}

command_line() {  # command_line train|generate ARGUMENT...: a command with every array in an allocation of its own
    python -c 'import sys, cupy; cupy.cuda.set_allocator(None)
from char_gru.rnn import commands
sys.exit(getattr(commands, sys.argv[1])(sys.argv[2:]))' "$@"
}

equal_bytes() {  # the files of two runs that hold no clock times
    for file in metrics.jsonl samples.txt last.safetensors best.safetensors; do
        cmp "$1/$file" "$2/$file" || return 1
    done
}

# Each group is recorded when it is done: a limit of time cuts off the end of this list only.
suite=(bench/bench_{gru,train_step,generate,matmul,cross_entropy,adam,input_table,sample,dropout,time_to_loss}.py)
small=(--data python-docs --rnn-units 70 --embedding-dim 20 --batch-size 5 --seq-length 7 --layers 2 --dropout 0.2
       --val-fraction 0 --steps 2 --device cuda)
tools=(memcheck racecheck initcheck synccheck) runs=(first second)
measure=(timeout 240 python -m pytest -q --device cuda --results "$out/results" "${suite[@]}")
check=(timeout 120 python -m pytest -q --gpu
       tests/test_{ptx,resident,matmul,input_table,gru,cross_entropy,adam,dropout}*.py
       tests/test_generate_{kernels,batched}.py tests/test_{sample,threads,interface,model_on_kernels}.py)
if [ "$quick" ]; then
    measure=(timeout 40 "${measure[@]:2}" --tutorial --rounds 5 -k char-gru)
    check=(timeout 30 "${check[@]:2}" -x)
    tools=(memcheck) runs=()
fi

part device nvidia-smi
[ "$quick" ] || part check timeout 120 python -m kernels --check
part suite "${measure[@]}"
[ "$quick" ] || part fit python -m bench.fit "$out"/results/cuda-*.json
part tests "${check[@]}"

export -f command_line
for tool in "${tools[@]}"; do
    rm -rf "$out/small"
    part "$tool-train" timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        bash -c 'command_line train "$@"' _ "${small[@]}" --out "$out/small"
    part "$tool-generate" timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        bash -c 'command_line generate "$@"' _ "$out/small" --prompt the --num-samples 3 --length 5 --top-k 5 \
        --device cuda
done

rm -rf "$out/graph" "$out/no-graph"
part one-epoch-graph timeout 30 python train.py "${text[@]}" --epochs 1 --device cuda --out "$out/graph"
part one-epoch-no-graph timeout 30 python train.py "${text[@]}" --epochs 1 --device cuda --no-graph \
    --out "$out/no-graph"
part graph-equal-bytes equal_bytes "$out/graph" "$out/no-graph"

for run in ${runs[@]+"${runs[@]}"}; do
    rm -rf "$out/$run"
    part "ten-epochs-$run" timeout 60 python train.py "${text[@]}" --epochs 10 --device cuda --out "$out/$run"
done
[ "$quick" ] || part equal-bytes equal_bytes "$out/first" "$out/second"
part generate python generate.py "$out/${runs[0]-graph}" --prompt "ROMEO:" --length 1000 --seed 1 --device cuda
rm -rf "$out/small" "$out/graph" "$out/no-graph" "$out/second" "$out"/first/*.safetensors

cat "$out/summary.txt"
