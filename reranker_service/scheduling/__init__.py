"""Scheduling: admits the work of many clients into one engine."""
