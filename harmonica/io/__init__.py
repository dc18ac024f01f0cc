"""Local and remote files, and the reading of weights without pickle.

Files lie under paths, in object stores or on the hub.
"""
