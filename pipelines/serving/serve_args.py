"""Define the settings of the application that Serve builds.

They name a model, and its routers: those of a registry, or an artifact folder.
"""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harmonica.builtin import CHAMPION as BUILTIN_CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.io.paths import local
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import told

from ..config.serve import ServeConfig
from ..config.workflow import WorkflowConfig
from ..tracking import registry
from .served_plan import UNCACHED

FOLLOW_S = 5.0
_MOST_VERSIONS = 50


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
    """Router artifact folder to serve instead, or `uncached`: every branch is computed, under the model's own
    sampler. Empty without MLflow either: the built-in champion."""

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
        """Return these settings with exactly one of `router` and `tracking_uri` set."""
        uri = "" if self.router else self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return self.model_copy(
            update={"tracking_uri": uri, "router": "" if uri else self.router or str(BUILTIN_CHAMPION)}
        )

    def current_version(self) -> str:
        """Return the version that is to be served now.

        It is the champion's, or the name of the artifact folder.
        """
        if self.tracking_uri:
            return registry.resolve(self.registered_model, registry.CHAMPION, self.tracking_uri)
        if self.router == UNCACHED:
            return UNCACHED
        return "builtin" if Path(self.router) == BUILTIN_CHAMPION else local(self.router, "router").name

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
