"""The accuracy report, which decides whether a calibrated bundle may be published.

``measure.py`` runs both bundles, ``forced.py`` compares logits of given tokens, ``frechet.py`` sets of generated
images; ``measures.py`` has the figures, ``budget.py`` the limits, ``result.py`` the report that holds
them. ``text.py``, ``page.py`` and ``sheet.py`` show it.
"""

from par_calibration.report.budget import LIMITS, Budget
from par_calibration.report.layers import LayerError
from par_calibration.report.measure import compare
from par_calibration.report.options import Options
from par_calibration.report.result import Report

__all__ = ["LIMITS", "Budget", "LayerError", "Options", "Report", "compare"]
