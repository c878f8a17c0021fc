#!/usr/bin/env bash
# A real-text experiment from nothing: a small base, six LoRA experts of it, and the table of losses.
#
#   PEFT_MOE_DATA=../shared/data bash recipes/text/run.sh
#
# Data: <PEFT_MOE_DATA>/<domain>/{train,valid,test}.jsonl with prompt, completion, domain, for math,
# code, medicine, law, german, french, general, science. Output: $OUT (default runs/text).
# Time: about 35 minutes for the base and 5 for each expert on one CPU core; 2 GB of memory.
# What is there already is not trained again: after an interruption start the same command again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${PEFT_MOE_DATA:-../shared/data}
out=${OUT:-runs/text}
python=${PYTHON:-python}
experts="math code medicine law german french"   # general and science stay without an expert
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for domain in $experts general science; do
  if [ ! -f "$data/$domain/train.jsonl" ]; then
    echo "No $data/$domain/train.jsonl. Set PEFT_MOE_DATA to the folder that holds" >&2
    echo "<domain>/{train,valid,test}.jsonl for: $experts general science." >&2
    exit 1
  fi
done

mkdir -p "$out"
[ -f "$out/data/science/test.jsonl" ] || "$python" recipes/text/prepare.py "$data" "$out/data"
export PEFT_MOE_DATA=$out/data

if [ ! -f "$out/base/summary.json" ]; then
  "$python" recipes/train_base.py --config recipes/configs/text_base.yaml \
    --output_dir "$out/base" --resume_from_checkpoint last
fi
seed=0
folders=()
for domain in $experts; do
  seed=$((seed + 1))
  folders+=("$out/$domain")
  [ -f "$out/$domain/summary.json" ] && continue
  "$python" recipes/train_expert.py --config recipes/configs/text_expert.yaml \
    --model_name_or_path "$out/base" --output_dir "$out/$domain" --seed "$seed" \
    --dataset_name "$out/data/$domain/train.jsonl" \
    --eval_dataset_name "$out/data/$domain/valid.jsonl"
done
"$python" recipes/text/losses.py --base "$out/base" --data "$out/data" \
  --experts "${folders[@]}" --output "$out/experts_matrix.json"
