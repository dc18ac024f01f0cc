"""How branches are run, apart from what they compute: one by one, compiled, or as captured graphs."""
