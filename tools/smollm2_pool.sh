#!/usr/bin/env bash
# Fine-tunes the pool of configs/smollm2.py: six full fine-tunes and two LoRA adapters of one model.
# They differ in mixture, rate and seed. What is there already is left as it is.
# usage: bash tools/smollm2_pool.sh      about 35 minutes on 2 cores, once the model is there
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh tools,reasoning-gym
[ -e pools/smollm2-instruct ] || .venv/bin/python tools/smollm2.py --out=pools/smollm2-instruct

finetune() {
  [ -e "pools/smollm2/$1" ] ||
    .venv/bin/python -m tools.finetune --config=configs/smollm2.py --out="pools/smollm2/$1" "${@:2}"
}

finetune sums --mixture=sums --steps=60 --learning_rate=1e-4 --seed=1
finetune letters --mixture=letters --steps=30 --learning_rate=1e-4 --seed=2
finetune sequence --mixture=sequence --steps=50 --learning_rate=1e-4 --seed=3
finetune sums-letters --mixture=sums:2,letters:1 --steps=30 --learning_rate=5e-5 --seed=4
finetune sequence-equations --mixture=sequence:2,equations:1 --steps=30 --learning_rate=2e-4 --seed=5
finetune reorder-letters --mixture=reorder:2,letters:1 --steps=30 --learning_rate=1e-4 --seed=6
finetune lora-sums --mixture=sums:3,sequence:1 --steps=30 --learning_rate=1e-3 --seed=7 --lora_rank=16
finetune lora-letters --mixture=letters:2,reorder:1 --steps=30 --learning_rate=2e-3 --seed=8 --lora_rank=16
