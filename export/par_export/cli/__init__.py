"""The verbs of ``parvis`` that need the exporter: ``export``, ``build``, ``tune``, and ``inspect`` of a checkpoint."""
