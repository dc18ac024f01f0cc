"""One file an architecture, each behind `base.BranchedTransformer`; `loading` finds the right one."""
