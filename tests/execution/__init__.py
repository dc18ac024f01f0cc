"""Levels of execution: compiled branches and recorded steps draw what eager ones do."""
