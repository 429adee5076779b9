"""The embedded laboratories: arithmetic stories in six tiers, and tiny policies that have cliffs on the hardest.

A laboratory is only data, tokenizer and weights, see :class:`hdpo.lab.task.Task`. Training knows nothing of it: the
stories are rows like any other data set's, and a policy loads with ``AutoModelForCausalLM``.
"""
