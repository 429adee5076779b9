"""The stations of a step, and what surrounds them, as Lightning callbacks."""

from hdpo.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from hdpo.callbacks.cliffs import CliffDetection
from hdpo.callbacks.distillation import DistillationRefresh
from hdpo.callbacks.evaluation import Evaluation
from hdpo.callbacks.export import PolicyExport
from hdpo.callbacks.progress import Progress
from hdpo.callbacks.replay import CliffReplay
from hdpo.callbacks.rollouts import RolloutGeneration
from hdpo.callbacks.samples import PredictionWriter, SampleLogger
from hdpo.callbacks.station import Station

__all__ = [
    "BestCheckpoint",
    "CliffDetection",
    "CliffReplay",
    "DistillationRefresh",
    "Evaluation",
    "LastCheckpoint",
    "PolicyExport",
    "PredictionWriter",
    "Progress",
    "RolloutGeneration",
    "SampleLogger",
    "Station",
]
