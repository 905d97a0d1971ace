#!/bin/sh
# Stands in for `entkd` in tests of the workflow: notes the call and makes the stage's output files.
echo "$*" >> calls.txt
echo "${CUDA_VISIBLE_DEVICES-any}" >> devices.txt
stage=$1
while [ $# -gt 1 ]; do
    case $1 in
        --output) output=$2 ;;
        --items | --curves | --table | --markdown | --latex | --effects) extra="$extra $2" ;;
    esac
    shift
done
case $stage in
    prepare-teacher | init-student) mkdir -p "$output/model" && touch "$output/model/config.json" "$output/manifest.json" ;;
    finetune-teacher)
        mkdir -p "$output/model"
        touch "$output/model/config.json" "$output/run.json" "$output/manifest.json"
        ;;
    prepare-data | seqkd-data) mkdir -p "$output" && touch "$output/manifest.json" ;;
    signals) mkdir -p "${output%/*}" && touch "$output" "${output%/*}/entropy.csv" ;;
    distill)  # a trial does not ask for the model
        mkdir -p "$output/model"
        touch "$output/model/model.safetensors" "$output/metrics.jsonl" "$output/run.json"
        ;;
    figures)
        mkdir -p "$output"
        for name in forest tasks curves effects entropy cost; do
            touch "$output/$name.pdf" "$output/$name.svg" "$output/$name.png"
        done
        ;;
    *) touch "$output" $extra ;;
esac
