"""Published checkpoint files, read safely: ``open_checkpoint`` maps the tensors, ``infer`` finds the architecture.

=================  ==================================================================================================
``load``           a file to a :class:`Checkpoint`: the tensors by the model's keys
``weights``        which tensors of the file these are: the trained ones or their average
``architecture``   a :class:`Checkpoint` to its configuration, with every key accounted for
``video``          the same of a video tokenizer
``keys``           keys and shapes against those of an architecture
``facts``          number of heads and token grid, which the shapes of the weights do not show
``beside``         ``config.json`` in the folder of the weights
``file``           which file a path means, and in which format it is
``pickle``         files of ``torch.save``, read without running anything in them
``recognise``      files that are no checkpoint of ours: what they are, and what to do
``hub``            names on the Hugging Face hub
=================  ==================================================================================================
"""

from par_model.checkpoint import hub
from par_model.checkpoint.architecture import Inferred, infer, par_config, vq_config
from par_model.checkpoint.errors import CheckpointError, some
from par_model.checkpoint.facts import Grid, downsampling
from par_model.checkpoint.file import INDEXES
from par_model.checkpoint.keys import FLOATS, UNUSED, check_keys
from par_model.checkpoint.load import Checkpoint, open_checkpoint
from par_model.checkpoint.video import is_video, video_config
from par_model.checkpoint.weights import KINDS, Kind

__all__ = [
    "FLOATS",
    "INDEXES",
    "KINDS",
    "UNUSED",
    "Checkpoint",
    "CheckpointError",
    "Grid",
    "Inferred",
    "Kind",
    "check_keys",
    "downsampling",
    "hub",
    "infer",
    "is_video",
    "open_checkpoint",
    "par_config",
    "some",
    "video_config",
    "vq_config",
]
