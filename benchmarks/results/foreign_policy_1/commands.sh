#!/usr/bin/env bash
# The starting policy (some minutes on two cores, then nothing), and the confirmatory runs; may be killed and repeated at any moment.
[ -e runs/policies/foreign_1/scores.json ] || OMP_NUM_THREADS=1 python -m hdpo.lab.build --task foreign --seed 1 --out runs/policies/foreign_1
python -m hdpo sweep --config configs/lab_foreign.yaml --config configs/eval/test.yaml \
    --arms benchmarks/results/foreign_policy_1/arms/{grpo,hdpo,sft_on_cliffs,initial_frozen}.yaml --seeds "${SEEDS:-3}" --out runs/foreign_policy_1 \
    -- --model.policy.path=runs/policies/foreign_1 --trainer.max_steps=200 --trainer.val_check_interval=40 --data.selection.num_train_problems=3200
