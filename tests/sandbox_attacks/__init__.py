"""Hostile code for the jail, by family; `test_sandbox_attacks` runs it and looks from outside."""
