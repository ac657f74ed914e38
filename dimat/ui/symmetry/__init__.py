"""`dimat symmetry`: a model's symmetry groups as tables, drawings and pages.

It derives groups through `dimat.symmetry` and has no rules of its own.
"""
