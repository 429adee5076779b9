"""How good a policy is: torchmetrics, evaluation records, intervals, statistics over runs, figures."""
