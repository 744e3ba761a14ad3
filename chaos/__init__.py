"""Chaos: injects faults into servers, connections and clocks while jobs run, and counts the scores that callers get."""
