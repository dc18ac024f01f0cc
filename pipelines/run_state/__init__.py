"""The state of a run is kept here: its storage, its progress and its lease.

The lease lets one driver alone write.
"""
