"""Published checkpoint files, read safely: ``open_checkpoint`` maps the tensors, ``infer`` finds the architecture.

=================  ==================================================================================================
``load``           a file to a :class:`Checkpoint`: the tensors by the model's keys
``architecture``   a :class:`Checkpoint` to its configuration, with every key accounted for
``facts``          number of heads and token grid, which the shapes of the weights do not show
``file``           which file a path means, and in which format it is
``pickle``         files of ``torch.save``, read without running anything in them
``hub``            names on the Hugging Face hub
=================  ==================================================================================================
"""

from par_model.checkpoint import hub
from par_model.checkpoint.architecture import UNUSED, Inferred, check_keys, infer, par_config, vq_config
from par_model.checkpoint.errors import CheckpointError
from par_model.checkpoint.facts import Grid, downsampling
from par_model.checkpoint.file import INDEX
from par_model.checkpoint.load import Checkpoint, open_checkpoint

__all__ = [
    "INDEX",
    "UNUSED",
    "Checkpoint",
    "CheckpointError",
    "Grid",
    "Inferred",
    "check_keys",
    "downsampling",
    "hub",
    "infer",
    "open_checkpoint",
    "par_config",
    "vq_config",
]
