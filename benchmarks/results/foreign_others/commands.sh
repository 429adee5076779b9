#!/usr/bin/env bash
# The confirmatory runs; may be killed and repeated at any moment.
python -m hdpo sweep --config configs/lab_foreign.yaml --config configs/eval/test.yaml \
    --arms benchmarks/results/foreign_others/arms/*.yaml --seeds "${SEEDS:-3}" --jobs 2 --out runs/foreign_others \
    -- --trainer.max_steps=200 --trainer.val_check_interval=40 --data.selection.num_train_problems=3200
