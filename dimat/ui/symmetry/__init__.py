"""`dimat symmetry`: a model's symmetry groups as tables, drawings and pages.

Derives through `dimat.symmetry`; holds no rules.
"""
