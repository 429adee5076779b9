#!/usr/bin/env bash
# The confirmatory runs; may be killed and repeated at any moment. SEEDS as for `sweep`: a number, or seeds with commas.
python -m hdpo sweep --config configs/lab_transfer.yaml --config configs/eval/test.yaml \
    --arms benchmarks/results/transfer/arms/{grpo,hdpo,initial_frozen,sft_on_cliffs}.yaml --seeds "${SEEDS:-3}" --out runs/transfer \
    -- --trainer.max_steps=200 --trainer.val_check_interval=40 --data.selection.num_train_problems=3200
# The second round; SEEDS was 5.
python -m hdpo sweep --config configs/lab_transfer.yaml --config configs/eval/test.yaml \
    --arms benchmarks/results/transfer/arms/{hard_labels,joint,hinted_grpo,dynamic_sampling}.yaml --seeds "${SEEDS:-3}" --out runs/transfer_rivals \
    -- --trainer.max_steps=200 --trainer.val_check_interval=40 --data.selection.num_train_problems=3200
