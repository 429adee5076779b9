#!/usr/bin/env bash
# The runs of the causal experiment; may be killed and repeated at any moment. SEEDS as for `sweep`: a number, or seeds with commas.
python -m hdpo sweep --config configs/lab.yaml --config configs/eval/test.yaml \
    --arms benchmarks/results/causal/arms/*.yaml --seeds "${SEEDS:-3}" --out runs/causal \
    -- --trainer.max_steps=120 --trainer.val_check_interval=40 --data.selection.num_train_problems=3200
