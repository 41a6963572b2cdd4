#!/usr/bin/env bash
# Measures what the tables of README.md and docs/ hold, one run after another, with one program:
#
#     MABERT_MODELS=... MABERT_DATA=... docs/scripts/measure.sh FOLDER [--full] [--only WORD]
#
# FOLDER gets the reports as JSON; docs/scripts/tables.py FOLDER makes the tables. It takes less than half an hour on
# two cores with nothing beside it. --full adds the end-to-end stage of both MiniLMs, which takes as long again;
# --only runs what has WORD in its name. What FOLDER holds already is not measured again.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '4,4s/^# *//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] && [[ $1 != -* ]] || usage
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
full=no only=
while [ $# -gt 0 ]; do
    case $1 in
        --full) full=yes ;;
        --only) [ $# -ge 2 ] || usage; only=$2; shift ;;
        *) usage ;;
    esac
    shift
done
: "${MABERT_MODELS:?the folder that holds minilm-sst2/ and minilm-mrpc/}"
: "${MABERT_DATA:?the folder that holds sst2/ and mrpc/}"
if [ -z "${ORT_DYLIB_PATH:-}" ]; then
    # The library that ./test installs.
    ORT_DYLIB_PATH=$(echo .venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)
    [ -f "$ORT_DYLIB_PATH" ] || { echo "onnxruntime is not here: run ./test once, or set ORT_DYLIB_PATH" >&2; exit 2; }
fi
export ORT_DYLIB_PATH CANDLE_NUM_THREADS=1

# What is measured, and where: a folder is of one build on one machine. Documents are no part of a build.
code=(-- . ':!docs' ':!*.md')
commit=$(git log -1 --format=%h "${code[@]}")
git diff --quiet HEAD "${code[@]}" || commit+=" with changes"
cpu() { sed -n "s/^$1[[:space:]]*: //p" /proc/cpuinfo | head -n 1; }
avx512=$(grep -qw avx512f /proc/cpuinfo && echo true || echo false)
build=$(
    printf '{"commit": "%s", "onnxruntime": "%s", "cores": %s, "avx512": %s, ' \
        "$commit" "${ORT_DYLIB_PATH##*.so.}" "$(nproc)" "$avx512"
    printf '"processor": "%s", "family": "%s", "model": "%s"}' \
        "$(cpu 'model name')" "$(cpu 'cpu family')" "$(cpu model)"
)
if [ -f "$out/build.json" ] && [ "$(cat "$out/build.json")" != "$build" ]; then
    echo "$out holds reports of another build or machine: $(cat "$out/build.json")" >&2
    exit 2
fi
cargo build --release --quiet -p onnx-mabert
cp target/release/onnx-mabert "$out/onnx-mabert"
echo "$build" > "$out/build.json"
program=$out/onnx-mabert

# measured NAME FILE COMMAND...: COMMAND's output in FILE, unless it is there already or not asked for.
measured() {
    local name=$1 file=$out/$2
    shift 2
    if [ -s "$file" ] || [[ $name != *"$only"* ]]; then return; fi
    echo "$(date +%T) $name" >&2
    "$@" > "$file.part"
    mv "$file.part" "$file"
}

# student NAME TEACHER TASK OPTIONS...: makes a student and measures it, and its teacher, on the task's dev set.
student() {
    local name=$1 teacher=$2 task=$3
    shift 3
    measured "$name" "$name.txt" "$program" rewrite "$teacher/model.onnx" -o "$out/$name.onnx" \
        --tokenizer "$teacher/tokenizer.json" --report "$out/$name.json" "$@"
    measured "$name" "$name.eval.json" "$program" -q --json eval "$teacher/model.onnx" "$out/$name.onnx" \
        --data "$MABERT_DATA/$task/dev.tsv" --tokenizer "$teacher/tokenizer.json" --label-column label
}

# bench NAME THREADS MODELS OPTIONS...
bench() {
    local name=$1 threads=$2
    shift 2
    measured "$name" "$name.json" "$program" -q --json --threads "$threads" bench "$@"
}

mini=fixtures/bert-mini-sst2
sst2=$MABERT_MODELS/minilm-sst2
mrpc=$MABERT_MODELS/minilm-mrpc
sst2_text=(--data "$MABERT_DATA/sst2/train.tsv" --max-seq 64)
mrpc_text=(--data "$MABERT_DATA/mrpc/train.tsv" --max-seq 128)

# README.md
student quickstart "$mini" sst2 --data fixtures/reviews/reviews.tsv
student sst2-blockwise "$sst2" sst2 "${sst2_text[@]}"
student mrpc-blockwise "$mrpc" mrpc "${mrpc_text[@]}"
engines=(--engine onnxruntime,tract --runs 50)
bench quickstart-bench 1 "$mini/model.onnx" "$out/quickstart.onnx" --seq 64 "${engines[@]}"
bench sst2-blockwise-bench 1 "$sst2/model.onnx" "$out/sst2-blockwise.onnx" --seq 64 "${engines[@]}"
bench mrpc-blockwise-bench 1 "$mrpc/model.onnx" "$out/mrpc-blockwise.onnx" --seq 128 "${engines[@]}"

# docs/performance.md. What a student answers makes no difference to its speed.
for form in hinges network; do
    measured lengths "$form.txt" "$program" -q rewrite "$sst2/model.onnx" -o "$out/$form.onnx" --transfer none \
        --max-seq 512 --softmax "$form" --hidden 128
done
for threads in 1 2; do
    bench "lengths-$threads" "$threads" "$sst2/model.onnx" "$out/hinges.onnx" "$out/network.onnx" --seq 32,128,512 \
        --engine onnxruntime,tract,plain-tract
    bench "texts-$threads" "$threads" "$sst2/model.onnx" "$out/sst2-blockwise.onnx" --seq 64 --batch 8 \
        --data "$MABERT_DATA/sst2/dev.tsv" --tokenizer "$sst2/tokenizer.json" --engine onnxruntime,tract \
        --runs 3 --warmup 1
done

# docs/transfer.md
student mini-closed-form "$mini" sst2 "${sst2_text[@]}" --transfer closed-form
student mini-blockwise "$mini" sst2 "${sst2_text[@]}"
student mini-full "$mini" sst2 "${sst2_text[@]}" --transfer full
student sst2-closed-form "$sst2" sst2 "${sst2_text[@]}" --transfer closed-form
student mrpc-closed-form "$mrpc" mrpc "${mrpc_text[@]}" --transfer closed-form
student sst2-made-up "$sst2" sst2 --max-seq 64
network=("${sst2_text[@]}" --transfer closed-form --softmax network)
student sst2-network "$sst2" sst2 "${network[@]}"
student sst2-per-layer "$sst2" sst2 "${network[@]}" --share layer
student sst2-shared "$sst2" sst2 "${network[@]}" --share all
student sst2-no-tables "$sst2" sst2 "${network[@]}" --length-tables off
student sst2-hidden-32 "$sst2" sst2 "${network[@]}" --hidden 32
student mrpc-network "$mrpc" mrpc "${mrpc_text[@]}" --transfer closed-form --softmax network
if [ "$full" = yes ]; then
    student sst2-full "$sst2" sst2 "${sst2_text[@]}" --transfer full
    student mrpc-full "$mrpc" mrpc "${mrpc_text[@]}" --transfer full
fi
