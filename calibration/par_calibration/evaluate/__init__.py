"""How good bundles are, beside real images that no training has seen: likelihood, tokenizer, generated images."""

from par_calibration.evaluate.result import Comparison, Evaluation, Kept, Likelihood, Set
from par_calibration.evaluate.run import Outcome, Request, evaluate

__all__ = ["Comparison", "Evaluation", "Kept", "Likelihood", "Outcome", "Request", "Set", "evaluate"]
