"""Quality study behind docs/quality.md: effect of the filter on trained models. Run by ``python -m quality.study``."""
