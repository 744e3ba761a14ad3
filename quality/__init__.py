"""The study behind docs/quality.md: does the filter make better models? ``python -m quality.study`` runs it."""
