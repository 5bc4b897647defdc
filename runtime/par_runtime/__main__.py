"""``python -m par_runtime`` is the command ``parvis``."""

from par_runtime.cli import main

raise SystemExit(main())
