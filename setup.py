"""Packages of the wheel; everything else is in pyproject.toml.

The folder `pipelines` installs as `harmonica_ray`, since a top-level package of its own name would collide
with others; its imports are relative, so that both names work. What made the built-in models is an example
for those who have a clone, and stays out.
"""

from setuptools import find_packages, setup

HARMONICA = find_packages(include=["harmonica", "harmonica.*"])
PIPELINES = find_packages("pipelines", exclude=["pretrain*"])

setup(
    packages=[*HARMONICA, "harmonica_ray", *(f"harmonica_ray.{name}" for name in PIPELINES)],
    package_dir={"harmonica_ray": "pipelines"},
)
