"""All settings of the workflow are here, one module a stage.

`pipelines.config.workflow` has them together.
"""
