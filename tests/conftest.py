"""Doctests are sought in every module but these, whose equal names pytest would take for one module."""

collect_ignore_glob = ["conftest.py", "*/conftest.py", "*/*/conftest.py"]
