"""The one table of precisions in PyTorch's terms.

A *precision* is what a user names ("fp16"), a *dtype* is torch's (``torch.float16``).
"""

from __future__ import annotations

import torch

#: precision -> torch's dtype, the most exact first.
PRECISION_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
