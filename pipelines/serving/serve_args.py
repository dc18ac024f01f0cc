"""Define the settings of the application that Serve builds.

They name a model, and its routers: those of a registry, or an artifact folder.
"""

import os
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harmonica.builtin import CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.io.paths import local
from harmonica.io.resolve import shipped_router
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import Cure, require, settings, told

from ..config.serve import ServeConfig
from ..config.workflow import WorkflowConfig
from ..tracking import registry
from .served_plan import is_untrained

FOLLOW_S = 5.0
_MOST_VERSIONS = 50
_MOST_LETTERS = 100


@settings("models")
class ServedModel:
    """The settings of one model of several that an endpoint serves."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""
    registered_model: str = ""
    """Name in MLflow's registry. Empty: the `model` that clients give."""
    router: str = ""
    """Router artifact folder to serve, `uncached` to compute every branch, or `even-1.8x` for evenly spread
    steps at that speed, which need no training. Empty: the registry's champion, else the built-in one."""


def builtin_router(model: ModelConfig) -> str:
    """Return the router that is served without MLflow.

    It is the first champion for a model that is not built in, since it may be a copy of that one's model.
    """
    return str(shipped_router(model.path) or CHAMPION)


class ServeArgs(BaseModel):
    """These are the settings of the application, `args:` in a Serve YAML file."""

    model_config = ConfigDict(extra="forbid")

    serve: ServeConfig = Field(default_factory=ServeConfig)
    """Host and port are Serve's own here: `http_options`."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The denoiser."""
    registered_model: str = WorkflowConfig().registered_model
    """Name in MLflow's registry, and the `model` that clients see."""
    tracking_uri: str = ""
    """MLflow, followed to the registered model's champion. Empty: MLFLOW_TRACKING_URI."""
    follow_s: float = Field(FOLLOW_S, gt=0)
    """Seconds between looks at which version is the champion; running replicas change over to it."""
    router: str = ""
    """Router artifact folder to serve instead, or one of those that need none, under the model's own sampler:
    `uncached` computes every branch, `even-1.8x` reuses evenly spread steps at that speed. Empty without
    MLflow either: the built-in champion."""
    models: Annotated[dict[str, ServedModel], Cure("the settings of each model by its name")] = Field(
        default_factory=dict
    )
    """Several models by the names that clients give as `model`; requests without one get the first. Empty:
    the one of the settings above."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.models:
            cure = "leave it out where models are given, and give it to one of these"
            for name in ("model", "registered_model", "router"):
                value = getattr(self, name)
                require(
                    value == type(self).model_fields[name].get_default(call_default_factory=True),
                    name,
                    value,
                    cure,
                )
        for name in self.models:
            good = 0 < len(name) <= _MOST_LETTERS and name.isprintable() and name == name.strip()
            require(good, "models", name, f"give names of 1 to {_MOST_LETTERS} printable characters")
        return self

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate settings.

        Raises:
            SettingError: a setting is rejected; the message names the field, the value and the cure.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise told(error, cls) from None

    def resolved(self) -> "ServeArgs":
        """Return these settings with exactly one of `router` and `tracking_uri` set.

        Of several models, each that has no router of its own follows `tracking_uri`.
        """
        if self.models:
            uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
            models = {
                name: replace(served, router=served.router or ("" if uri else builtin_router(served.model)))
                for name, served in self.models.items()
            }
            return self.model_copy(update={"tracking_uri": uri, "models": models})
        uri = "" if self.router else self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return self.model_copy(
            update={"tracking_uri": uri, "router": "" if uri else self.router or builtin_router(self.model)}
        )

    def by_name(self) -> dict[str, "ServeArgs"]:
        """Return the settings of each model, by the name that clients give.

        They name one model each, with exactly one of `router` and `tracking_uri` set.
        """
        if not self.models:
            return {self.registered_model: self.resolved()}
        return {
            name: self.model_copy(
                update={
                    "model": served.model,
                    "registered_model": served.registered_model or name,
                    "router": served.router,
                    "models": {},
                }
            ).resolved()
            for name, served in self.models.items()
        }

    def current_version(self) -> str:
        """Return the version that is to be served now.

        It is the champion's, or the name of the artifact folder.
        """
        if self.tracking_uri:
            return registry.resolve(self.registered_model, registry.CHAMPION, self.tracking_uri)
        if is_untrained(self.router):
            return self.router
        is_builtin = Path(self.router) == Path(builtin_router(self.model))
        return "builtin" if is_builtin else local(self.router, "router").name

    def load(self, version: str) -> RouterArtifact:
        """Load a registered version, or the artifact folder."""
        if self.tracking_uri:
            return registry.load_version(self.registered_model, version, self.tracking_uri)
        return RouterArtifact.load(self.router)

    def versions(self) -> list[str]:
        """Return the registered versions, newest first.

        There are none if an artifact folder is served.
        """
        if not self.tracking_uri:
            return []
        return registry.newest_versions(self.registered_model, self.tracking_uri, _MOST_VERSIONS)


def read_models(file: str) -> dict[str, ServedModel]:
    """Read the models of a YAML or JSON file, by the names that clients give.

    Raises:
        ValueError: the file cannot be read, has no model, or a setting of one is rejected.
    """
    cure = "give a YAML file that has `NAME: {model: {path: PATH}}` for each model"
    try:
        read = yaml.safe_load(local(file, "models").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"models is {file!r}, which cannot be read ({why}): {cure}") from error
    require(isinstance(read, dict) and bool(read), "models", file, cure)
    return ServeArgs.model_validate({"models": {str(name): served for name, served in read.items()}}).models
