"""Formulas of the method written a second time, in fp64 numpy, from the papers; imports nothing from entkd."""
