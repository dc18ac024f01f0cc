"""All settings of the workflow, one module a stage; `workflow` has them together."""
