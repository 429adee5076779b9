"""Grading of completions, in worker processes that can be killed or in the trainer's.

Importing this package is cheap: sympy and math-verify are loaded by the workers alone.
"""

from hdpo.rewards.base import Grade, Outcome, PendingGrades, Verifier, VerifierError
from hdpo.rewards.functions import FunctionVerifier
from hdpo.rewards.math_verifier import MathVerifier
from hdpo.rewards.multiple_choice import MultipleChoiceVerifier
from hdpo.rewards.python_code import PythonCodeVerifier

__all__ = [
    "FunctionVerifier",
    "Grade",
    "MathVerifier",
    "MultipleChoiceVerifier",
    "Outcome",
    "PendingGrades",
    "PythonCodeVerifier",
    "Verifier",
    "VerifierError",
]
